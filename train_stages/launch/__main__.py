"""`python -m regiontower.train_stages.launch NAME` prints where the launch file lies."""

import sys

from . import launch_file, launch_names

if len(sys.argv) != 2:
    sys.exit(f"give one of {', '.join(launch_names())}")
try:
    print(launch_file(sys.argv[1]))
except ValueError as error:
    sys.exit(str(error))
