"""A folder of scenes on disk: `OUT/images/*.jpg` + `OUT/records.jsonl`, resumable, on one or more processes.

Pictures are JPEG (quality 92, no chroma subsampling): photographs as PNG would take three times the space and more
time, and without subsampling the thin coloured strokes of glyphs and letters keep their colour.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from .errors import user_error
from .generate import Scene, generate_scene, image_name
from .presets import EVAL_SEED_START, ScenePreset, scene_preset
from .words import word_list

RECORDS = "records.jsonl"
PARTIAL = "records.jsonl.part"  # records of a run that has not ended yet, in order
SETTINGS = "scenes.json"  # what the folder holds, so that it is never continued with other settings
PARALLEL_FROM = 400  # scenes from which a second process repays its start


def write_scenes(
    out: str | os.PathLike[str],
    count: int,
    seed: int,
    preset: str | ScenePreset = "default",
    words: str = "seen",
    progress: bool = True,
    workers: int | None = None,
) -> Path:
    """Write scenes `seed` ... `seed + count - 1` into folder `out`; returns the path of `records.jsonl`.

    Every scene depends on its own seed alone, so the files are the same for any `workers` (None: two processes when
    that pays) and after any number of interruptions: finished scenes are kept, and a larger `count` continues.
    `progress` shows a bar with the time left on stderr.

    Raises UserError when the seeds cross `EVAL_SEED_START` (a folder is for training or for evaluation), for a count
    below 1 or a negative seed, and when `out` holds scenes of other settings.
    """
    rules = scene_preset(preset)
    word_list(words)
    _check_range(count, seed)
    folder = Path(out)
    settings = {"seed": seed, "words": words, "preset": asdict(rules)}
    _claim(folder, settings)
    done = _finished(folder, count, seed)
    processes = workers or (min(2, os.cpu_count() or 1) if count - len(done) >= PARALLEL_FROM else 1)
    partial = folder / PARTIAL
    with (
        partial.open("w", encoding="utf-8") as file,
        tqdm(
            total=count,
            initial=len(done),
            desc=f"scenes ({rules.name})",
            unit="scene",
            mininterval=0.5,
            disable=not progress,
        ) as bar,
    ):
        file.writelines(done)
        with _lines(folder, range(seed + len(done), seed + count), rules, words, processes) as lines:
            for line in lines:
                file.write(line)
                bar.update()
    records = folder / RECORDS
    os.replace(partial, records)
    return records


def save_scene(scene: Scene, folder: Path) -> str:
    """Write the scene's picture (complete or not at all); returns its record as one line of JSON."""
    path = folder / scene.record.image
    temporary = path.with_suffix(".tmp")
    scene.image.save(temporary, "JPEG", quality=92, subsampling=0)
    os.replace(temporary, path)
    return scene.record.model_dump_json(exclude_defaults=True) + "\n"


def _check_range(count: int, seed: int) -> None:
    if count < 1:
        raise user_error(f"The number of scenes must be at least 1, not {count}.")
    if seed < 0:
        raise user_error(f"The first seed must be at least 0, not {seed}.")
    if seed < EVAL_SEED_START < seed + count:
        raise user_error(
            f"Seeds {seed} to {seed + count - 1} cross {EVAL_SEED_START}, where evaluation scenes start: "
            f"use --seed {max(0, EVAL_SEED_START - count)} or lower for training, {EVAL_SEED_START} or higher for "
            "evaluation."
        )


def _claim(folder: Path, settings: dict) -> None:
    """Make the folder and note its settings, or check that it was made with the same ones."""
    if folder.exists() and not folder.is_dir():
        raise user_error(f"{folder} is a file: give a folder for the scenes.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        if (folder / RECORDS).exists():
            raise user_error(f"{folder} holds records that are not scenes: choose another folder.")
        path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8")) != wanted:
        raise user_error(f"{folder} holds scenes of other settings (see {path}): choose another folder or delete it.")


def _finished(folder: Path, count: int, seed: int) -> list[str]:
    """The records of the scenes that are complete, from the first one on: a whole line and a picture each."""
    sources = [path for path in (folder / PARTIAL, folder / RECORDS) if path.exists()]
    done: list[str] = []
    for source in sources:
        lines: list[str] = []
        with source.open(encoding="utf-8") as file:
            for line in file:
                if len(lines) == count or not _complete(folder, line, seed + len(lines)):
                    break
                lines.append(line)
        done = max(done, lines, key=len)
    return done


def _complete(folder: Path, line: str, seed: int) -> bool:
    """Whether `line` is the whole record of scene `seed` and its picture is there."""
    name = image_name(seed)
    return line.endswith("}\n") and line.startswith(f'{{"image":"{name}"') and (folder / name).is_file()


@contextmanager
def _lines(folder: Path, seeds: range, rules: ScenePreset, words: str, processes: int) -> Iterator[Iterator[str]]:
    """Make the scenes of `seeds`; gives their record lines in order."""
    if processes == 1:
        yield (save_scene(generate_scene(seed, rules, words), folder) for seed in seeds)
        return
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(folder, seeds[k::processes], rules, words)) for k in range(processes)]
        yield (_next_line(workers[i % processes]) for i in range(len(seeds)))


@contextmanager
def _worker(folder: Path, seeds: range, rules: ScenePreset, words: str) -> Iterator[subprocess.Popen[str]]:
    """A process that writes the pictures of `seeds` and prints their records (see `scenes.worker`).

    A plain command rather than multiprocessing: spawn would run the caller's main script again, and fork is not safe
    beside the threads of torch.
    """
    job = {"out": str(folder), "seeds": [seeds.start, seeds.stop, seeds.step], "preset": asdict(rules), "words": words}
    command = [sys.executable, "-m", f"{__package__}.worker", json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def _next_line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout else ""
    if not line.endswith("\n"):
        raise RuntimeError(f"a scene process ended too early (exit status {process.wait()}); its error is above")
    return line
