"""`python -m regiontower`."""

from .cli import main

main()
