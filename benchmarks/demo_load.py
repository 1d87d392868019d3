"""The demo under load: many programs talk at once, each about its own picture, through the HTTP API.

    regiontower bench demo-load [--sessions 20] [--turns 5] --json

A server of `nano` in its own process; sessions are threads here. Every session's picture is a generated scene with a
word that no other session's picture holds. All conversations are had twice: one after the other, then all at once.
`crosstalk` counts answers of the second time that differ from the first (decoding is greedy, so nothing but another's
picture or words could change them). `ttft` is from the moment the question is sent to the first piece of its answer,
queue included.
"""

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
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
    scenes = scenes_with_words(arguments.sessions)
    with running_demo(arguments.model, arguments.threads) as url:
        alone = [converse(url, scene, arguments.turns) for scene, _ in scenes]
        started = time.perf_counter()
        with ThreadPoolExecutor(arguments.sessions) as pool:
            together = list(pool.map(lambda row: converse(url, row[0], arguments.turns), scenes))
        seconds = time.perf_counter() - started
    results = {
        "sessions": arguments.sessions,
        "turns": arguments.turns,
        **summary([word for _, word in scenes], alone, together),
        "seconds": round(seconds, 1),
        "command": f"regiontower bench demo-load --sessions {arguments.sessions} --turns {arguments.turns} --json",
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def summary(words: Sequence[str], alone: Sequence[Talk], together: Sequence[Talk]) -> dict[str, Any]:
    """What the two runs of the same conversations say about each other."""
    pairs = [(a, b) for one, many in zip(alone, together, strict=True) for a, b in zip(one.answers, many.answers)]  # noqa: B905
    foreign = sum(
        talk.answers[0] in words and talk.answers[0] != word and talk.answers[0] != own.answers[0]
        for word, own, talk in zip(words, alone, together, strict=True)
        if talk.answers and own.answers
    )
    times = np.array([seconds for talk in together for seconds in talk.ttft] or [float("nan")])
    by_itself = np.array([seconds for talk in alone for seconds in talk.ttft] or [float("nan")])
    return {
        "errors": sum(len(talk.errors) for talk in (*alone, *together)),
        "first_errors": [error for talk in (*alone, *together) for error in talk.errors][:3],
        "answers": sum(len(talk.answers) for talk in together),
        "crosstalk": sum(a != b for a, b in pairs),
        "words_of_others": foreign,
        "own_word_read": sum(t.answers[:1] == [word] for word, t in zip(words, together, strict=True)),
        "ttft_p50": round(float(np.percentile(times, 50)), 3),
        "ttft_p95": round(float(np.percentile(times, 95)), 3),
        "ttft_alone_p50": round(float(np.percentile(by_itself, 50)), 3),
    }


def scenes_with_words(count: int) -> list[tuple[Scene, str]]:
    """Scenes with one sign each, all of different words."""
    found: dict[str, Scene] = {}
    seed = FIRST_SEED
    while len(found) < count:
        scene = generate_scene(seed)
        seed += 1
        words = [region.ocr for region in scene.record.regions if region.category == SIGN]
        if len(words) == 1 and words[0] and words[0] not in found:
            found[words[0]] = scene
    return [(scene, word) for word, scene in found.items()]


def converse(url: str, scene: Scene, turns: int) -> Talk:
    """One session of a program: opens the picture and asks `turns` questions."""
    from gradio_client import Client

    talk = Talk()
    file = io.BytesIO()
    scene.image.save(file, "PNG")
    sign = next(region for region in scene.record.regions if region.category == SIGN)
    marks = [{"number": 1, "box_xyxy": list(sign.box_xyxy), "label": ""}]
    questions = ["Read [1].", "What is in [1]?", "Find the sign", LIST_ALL, "Read this."]
    try:
        client = Client(url, verbose=False, httpx_kwargs={"timeout": 600})
        picture = base64.b64encode(file.getvalue()).decode()
        session = client.predict(picture, "scene.png", api_name="/open_picture")["session"]
        for number in range(turns):
            started, first, last = time.perf_counter(), None, None
            for last in client.submit(session, questions[number % len(questions)], marks, api_name="/ask_stream"):
                if last["answer"] and first is None:
                    first = time.perf_counter() - started
            if last is None or last["state"] != "done":
                raise RuntimeError(f"turn {number + 1} ended as {last}")
            talk.answers.append(last["answer"])
            talk.ttft.append(first if first is not None else time.perf_counter() - started)
        client.predict(session, api_name="/close")
    except Exception as error:
        talk.errors.append(f"{type(error).__name__}: {error}")
    return talk


@contextmanager
def running_demo(model: str, threads: int) -> Iterator[str]:
    """The demo as its command starts it, in a process of its own; gives its address."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "regiontower", "demo", model, "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if address := re.search(r"the demo is at (\S+)", line):
                yield address[1]
                return
        raise UserError(f"the demo did not start: {''.join(said)[-500:]}")
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    main()
