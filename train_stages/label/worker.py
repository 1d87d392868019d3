"""`python -m regiontower.train_stages.label.worker JOB`: a process of `label_in_processes`; JOB is its JSON.

It reads shard numbers from stdin, one a line, and answers `images N` for every batch, then `done RESULT`; or
`error SENTENCE` before it ends.
"""

import json
import os
import signal
import sys
from dataclasses import asdict

import torch

from ...vision_towers.errors import UserError
from .engines import find_engine
from .processes import Job


def main(job_text: str) -> None:
    """Label the shards that stdin names."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand between the answers

    def say(text: str) -> None:
        answers.write(text + "\n")
        answers.flush()

    job = Job(**json.loads(job_text))
    torch.set_num_threads(job.threads)
    try:
        labeller = job.open(find_engine(job.engine))
        for line in sys.stdin:
            part = job.label(int(line), labeller, lambda images: say(f"images {images}"))
            say("done " + json.dumps(asdict(part), ensure_ascii=False))
    except BrokenPipeError:  # the run was killed: nobody is there to be told
        os._exit(1)
    except UserError as error:
        say("error " + json.dumps(str(error), ensure_ascii=False))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the first process, which then ends this one
    main(sys.argv[1])
