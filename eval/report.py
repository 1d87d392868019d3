"""One HTML file, nothing beside it needed: figures, loss curves, and pictures with true and predicted boxes."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..mllm.boxes import Boxes
from ..mllm.draw import draw_boxes
from ..train_stages.images import open_image
from .run import EvalResult
from .scoring import METRICS
from .task_rows import TASKS

PICTURE_SIDE = 480  # pixels of the longer side in the gallery
TRUE_COLOR, MODEL_COLOR = "lime", "magenta"  # of very different lightness, for the colour-blind
_ANSWER_LENGTH = 160
_LEGENDS = {  # of the tasks whose answer is a box
    "grounding": "green: the true box, pink: the model's",
    "absent": "nothing in the picture fits; pink: a box that the model gave all the same",
}


def write_report(
    result: EvalResult,
    out: str | Path,
    *,
    title: str = "regiontower evaluation",
    who: str = "model",
    curves: Mapping[str, str | Path] | None = None,
    beside: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    gallery: int = 12,
) -> Path:
    """Write `OUT/index.html` and return its path.

    Args:
        result: of `run.evaluate`; its images must still be there.
        out: folder, made if needed.
        who: what the table calls the model.
        curves: caption -> image file of a loss plot.
        beside: task -> name -> figures to stand beside the model's: other models, `baselines.trivial_baselines`.
        gallery: at most so many pictures a task.

    Raises:
        ImageError: a picture that cannot be opened.
    """
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    page = env.get_template("report.html.jinja").render(
        title=title,
        figures=_figures(who, result.tasks, beside or {}),
        curves=[{"name": name, "source": _data_url(open_image(path), "PNG")} for name, path in (curves or {}).items()],
        galleries=[_gallery(name, rows, gallery) for name, rows in result.samples.items() if rows],
        facts=_facts(result.results),
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _figures(
    model: str, tasks: Mapping[str, Mapping], beside: Mapping[str, Mapping[str, Mapping]]
) -> list[dict[str, str]]:
    rows = []
    for name, figures in tasks.items():
        for who, found in [(model, figures), *beside.get(name, {}).items()]:
            for metric in METRICS[TASKS[name]]:
                value = found[metric]
                rows.append(
                    {
                        "task": f"{TASKS[name]} (n = {found['n']})",
                        "who": who.replace("_", " "),
                        "metric": metric,
                        "value": "no rows" if value is None else f"{value:.3f}",
                        "interval": "" if value is None else "{:.3f} to {:.3f}".format(*found["ci95"][metric]),
                    }
                )
    return rows


def _gallery(name: str, rows: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    # Every k-th row: neither the first images only, nor the flattering ones.
    count = min(count, len(rows))
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    return {
        "task": TASKS[name],
        "n": len(rows),
        "legend": _LEGENDS.get(TASKS[name], "green: the box that is asked about"),
        "pictures": [_picture(row, TASKS[name] in _LEGENDS) for row in chosen],
    }


def _picture(row: Mapping[str, Any], located: bool) -> dict[str, Any]:
    """located: the answer is a box, or that there is none."""
    boxes = {TRUE_COLOR: row["target"] if located else row["prompt_boxes"][0]}
    if located and row["predicted_xyxy"] is not None:
        boxes[MODEL_COLOR] = row["predicted_xyxy"]
    boxes = {color: box for color, box in boxes.items() if box}
    answer = row["answer"]
    return {
        "source": _data_url(_with_boxes(open_image(row["image"]), boxes), "JPEG"),
        "question": row["question"],
        "answer": (answer[:_ANSWER_LENGTH] + " ...") if len(answer) > _ANSWER_LENGTH else answer or "(no answer)",
        "target": None if located else " / ".join(row["target"]),
        "iou": row.get("iou"),
        "correct": row["correct"],
    }


def _with_boxes(image: Image.Image, boxes: Mapping[str, Sequence[float]]) -> Image.Image:
    """A copy of the gallery's size with the boxes (colour -> xyxy in pixels of `image`) drawn on it.

    Without labels: on a small box a label would hide what is in it.
    """
    picture = image.copy()
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    scale = np.array([picture.width / image.width, picture.height / image.height] * 2)
    return draw_boxes(picture, Boxes([box * scale for box in boxes.values()]), list(boxes))


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, arguments = results["data"], results["arguments"]
    return [
        ("model", results["model"]),
        ("weights (SHA-256)", results["weights_sha256"]),
        ("box format", f"{results['box_format']['model']}, scored as {results['box_format']['scored']}"),
        ("data", f"{data['path']}, {data['records']} images, {len(data['bad_records'])} bad records skipped"),
        ("data (SHA-256)", data["sha256"]),
        ("limit of rows a task", "none" if arguments["limit"] is None else str(arguments["limit"])),
        ("device", arguments["device"]),
        ("seconds", str(results["seconds"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items())),
    ]


def _data_url(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
