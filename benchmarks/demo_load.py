"""The demo under load: many programs talk at once, each about its own picture, through the HTTP API.

    regiontower bench demo-load [--sessions 20] [--turns 5] --json

A server of `nano` in its own process; sessions are threads here. Every session's picture is a generated scene with a
sign whose word stands on no other session's sign, and which the model reads rightly when nobody else is there: of a
picture that it misreads nobody could say whose answer came back (`pictures_tried` says how many were looked at). All
conversations are then had twice: one after the other, then all at once, beginning when the last picture is open.

`crosstalk` counts answers of the second time that differ from the first: decoding is greedy, so nothing but another's
picture or words could change them. `words_of_others` counts readings that are another session's word. `different` says,
turn by turn, how many different answers the sessions have when alone: of two alike, a mix-up would not be seen.
`ttft` is from the moment the question is sent until the first token of its answer is there, queue and network included.
`ttft_alone` is the same of the first time: the same client and server, no queue and nobody else at work.

Ends with status 1 after an error, a missing answer or crosstalk.
"""

import argparse
import base64
import collections
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from regiontower.benchmarks._stamp import stamp
from regiontower.mllm.prompts import LIST_ALL
from regiontower.train_stages.scenes import EVAL_SEED_START, SIGN, Scene, generate_scene
from regiontower.vision_towers import UserError

FIRST_SEED = EVAL_SEED_START + 5000
READ = "Read [1]."
# The first and the last ask for the word of the own picture, in two ways.
QUESTIONS = (READ, "What is in [1]?", "Find the sign", LIST_ALL, "Read this.")
READINGS = (READ, "Read this.")
PATIENCE = 600  # seconds


@dataclass
class Talk:
    """One conversation: answers, seconds to their first pieces, and what went wrong."""

    answers: list[str] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--threads", type=int, default=1, help="of the server's arithmetic; it answers two at once")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    with running_demo(arguments.model, arguments.threads) as url:
        scenes, tried = readable_scenes(url, arguments.sessions)
        alone = [converse(url, scene, arguments.turns) for scene, _ in scenes]
        gate = threading.Barrier(arguments.sessions)
        started = time.perf_counter()
        with ThreadPoolExecutor(arguments.sessions) as pool:
            together = list(pool.map(lambda row: converse(url, row[0], arguments.turns, gate), scenes))
        seconds = time.perf_counter() - started
    results = {
        "sessions": arguments.sessions,
        "turns": arguments.turns,
        **summary([word for _, word in scenes], alone, together),
        "pictures_tried": tried,
        "seconds": round(seconds, 1),
        "command": f"regiontower bench demo-load --sessions {arguments.sessions} --turns {arguments.turns} --json",
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))
    if results["errors"] or results["crosstalk"] or results["answers"] < arguments.sessions * arguments.turns:
        sys.exit("regiontower: the demo did not hold under load; errors, crosstalk and answers above say how.")


def summary(words: Sequence[str], alone: Sequence[Talk], together: Sequence[Talk]) -> dict[str, Any]:
    """What the two runs of the same conversations say about each other; `words` are the pictures' own."""
    changed = foreign = own_word_read = 0
    for word, first, second in zip(words, alone, together, strict=True):
        others = set(words) - {word}
        for turn, (before, after) in enumerate(zip(first.answers, second.answers, strict=False)):
            changed += before != after
            if QUESTIONS[turn % len(QUESTIONS)] in READINGS:
                foreign += after in others and after != before
        own_word_read += second.answers[:1] == [word]
    turns = max((len(talk.answers) for talk in alone), default=0)
    errors = [error for talk in (*alone, *together) for error in talk.errors]
    return {
        "errors": len(errors),
        "first_errors": errors[:3],
        "answers": sum(len(talk.answers) for talk in together),
        "crosstalk": changed,
        "words_of_others": foreign,
        "own_word_read": own_word_read,
        "different": [len({talk.answers[turn] for talk in alone if turn < len(talk.answers)}) for turn in range(turns)],
        "ttft_p50": _percentile(together, 50),
        "ttft_p95": _percentile(together, 95),
        "ttft_alone_p50": _percentile(alone, 50),
        "ttft_alone_p95": _percentile(alone, 95),
    }


def _percentile(talks: Sequence[Talk], percent: int) -> float | None:
    times = [seconds for talk in talks for seconds in talk.ttft]
    return round(float(np.percentile(np.array(times), percent)), 3) if times else None


def scenes_with_words() -> Iterator[tuple[Scene, str]]:
    """Scenes with one sign each, all of different words, and the words."""
    seen: set[str] = set()
    for seed in range(FIRST_SEED, FIRST_SEED + 100_000):
        scene = generate_scene(seed)
        words = [region.ocr for region in scene.record.regions if region.category == SIGN]
        if len(words) == 1 and words[0] and words[0] not in seen:
            seen.add(words[0])
            yield scene, words[0]


def readable_scenes(url: str, count: int) -> tuple[list[tuple[Scene, str]], int]:
    """So many of them whose word the model reads when it is asked alone, and how many were tried.

    Raises:
        UserError: it reads fewer than one in ten, or the server fails.
    """
    found = []
    for tried, (scene, word) in enumerate(scenes_with_words(), 1):
        talk = converse(url, scene, 1)
        if talk.errors:
            raise UserError(f"the demo failed before there was any load: {talk.errors[0]}")
        if talk.answers == [word]:
            found.append((scene, word))
        if len(found) == count:
            return found, tried
        if tried == 10 * count:
            break
    raise UserError(f"the model reads {len(found)} words of {10 * count} pictures: too few to tell sessions apart.")


def converse(url: str, scene: Scene, turns: int, gate: threading.Barrier | None = None) -> Talk:
    """One session of a program: opens the picture, waits at the gate for the others, and asks `turns` questions."""
    from gradio_client import Client

    talk = Talk()
    file = io.BytesIO()
    scene.image.save(file, "PNG")
    sign = next(region for region in scene.record.regions if region.category == SIGN)
    marks = [{"number": 1, "box_xyxy": list(sign.box_xyxy), "label": ""}]
    try:
        client = Client(url, verbose=False, httpx_kwargs={"timeout": PATIENCE})
        picture = base64.b64encode(file.getvalue()).decode()
        session = client.predict(picture, "scene.png", api_name="/open_picture")["session"]
        if gate is not None:
            gate.wait(PATIENCE)
        for number in range(turns):
            started, first, last = time.perf_counter(), None, None
            for last in client.submit(session, QUESTIONS[number % len(QUESTIONS)], marks, api_name="/ask_stream"):
                if last["answer"] and first is None:
                    first = time.perf_counter() - started
            if last is None or last["state"] != "done":
                raise RuntimeError(f"turn {number + 1} ended as {last}")
            talk.answers.append(last["answer"])
            talk.ttft.append(first if first is not None else time.perf_counter() - started)
        client.predict(session, api_name="/close")
    except Exception as error:
        talk.errors.append(f"{type(error).__name__}: {error}")
        if gate is not None:
            gate.abort()  # nobody shall wait for this one
    return talk


@contextmanager
def running_demo(model: str, threads: int) -> Iterator[str]:
    """The demo as its command starts it, in a process of its own; gives its address."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "regiontower", "demo", model, "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    assert server.stderr is not None
    said: collections.deque[str] = collections.deque(maxlen=20)
    try:
        address = None
        for line in server.stderr:
            said.append(line)
            if address := re.search(r"the demo is at (\S+)", line):
                break
        if address is None:
            raise UserError(f"the demo did not start: {''.join(said)[-500:]}")
        # Whatever it says later is taken from it, or it would stand still once the pipe is full.
        threading.Thread(target=said.extend, args=(server.stderr,), daemon=True).start()
        yield address[1]
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    main()
