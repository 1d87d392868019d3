"""The suite over several sources, with a model that knows the records: numbers, files, resuming, the report."""

import json

import pytest

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from PIL import Image

from regiontower.eval.grounding_suite import GroundingData, find_sources, run_grounding_suite
from regiontower.eval.opened import Opening
from regiontower.eval.task_kinds import RECORD_TASKS
from regiontower.mllm import Answer
from regiontower.mllm.boxes import Boxes, ImageFrame, ParsedBoxes, box_format
from regiontower.train_stages.masks import encode_mask
from regiontower.train_stages.record_io import read_records
from regiontower.vision_towers.errors import UserError

SIZE = (100, 80)


def write_source(folder, first: int, images: int = 2, ocr: bool = True):
    """Pictures told apart by their gray, from `first` on, with two cups, a sign, phrases, captions and masks."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(first, first + images):
        Image.new("RGB", SIZE, (number, number, number)).save(folder / f"{number}.png")
        boxes = [[10 + number, 10, 40 + number, 40], [50, 10, 80, 40], [20, 50, 90, 75]]
        masks = []
        for x0, y0, x1, y1 in boxes:
            mask = np.zeros((80, 100), dtype=bool)
            mask[y0:y1, x0:x1] = True
            masks.append(encode_mask(mask))
        cups = [
            {"category": "cup", "texts": ["a cup", f"the {side} cup"], "captions": [f"a cup on the {side}"]}
            for side in ("left", "right")
        ]
        sign = {"category": "sign", "texts": ["the sign"], **({"ocr": f"EXIT {number}"} if ocr else {})}
        regions = [
            {"box_xyxy": box, "mask": mask, **about}
            for box, mask, about in zip(boxes, masks, (*cups, sign), strict=True)
        ]
        line = {"image": f"{number}.png", "width": 100, "height": 80, "absent": ["a cow"], "regions": regions}
        lines.append(json.dumps(line))
    (folder / "val.jsonl").write_text("\n".join(lines))
    return folder / "val.jsonl"


class Oracle:
    """Right answers with scores from the records; remembers what it was asked, raises after `fail_after` answers."""

    def __init__(self, *paths, fail_after: int | None = None):
        records = [record for path in paths for record in read_records(path).records]
        self.records = {int(record.image.split(".")[0]): record for record in records}
        self.asked: list[tuple] = []
        self.fail_after = fail_after

    def __call__(self, model, processor, questions, max_new_tokens=48, batch_size=16):
        if self.fail_after is not None and len(self.asked) + len(questions) > self.fail_after:
            raise RuntimeError("the power went out")
        answers = []
        for question in questions:
            number = question.image.getpixel((0, 0))[0]
            boxes = [list(map(float, box)) for box in question.boxes]
            self.asked.append((number, question.text, str(boxes)))
            answers.append(self.answer(self.records[number], question.text, boxes))
        return answers

    def answer(self, record, text, boxes):
        if text.startswith("Where is "):
            phrase = text.removeprefix("Where is ").removesuffix("?")
            found = [r.box_xyxy for r in record.regions if phrase in (*r.texts, r.category, f'the text "{r.ocr}"')]
            written = box_format("int1000").write(Boxes(found), ImageFrame.identity(SIZE))
            parsed = box_format("int1000").parse(written, ImageFrame.identity(SIZE))
            if found:
                parsed = ParsedBoxes("boxes", parsed.boxes, parsed.spans, [0.9 - 0.1 * i for i in range(len(found))])
            return Answer(written, parsed)
        x, y = (boxes[0][0] + boxes[0][2]) / 2, (boxes[0][1] + boxes[0][3]) / 2
        region = next(
            r for r in record.regions if r.box_xyxy[0] <= x <= r.box_xyxy[2] and r.box_xyxy[1] <= y <= r.box_xyxy[3]
        )
        if text.startswith("Is the object"):
            said = f"a {region.category}"
        elif text.startswith("Read"):
            said = region.ocr
        else:
            said = region.captions[0] if text.startswith("Describe") else region.texts[-1]
        return Answer(said, ParsedBoxes("none"))


@pytest.fixture
def sources(tmp_path):
    return write_source(tmp_path / "data" / "kitchen", 0), write_source(tmp_path / "data" / "street", 2, 1, ocr=False)


@pytest.fixture
def run(sources, make_chat, tmp_path):
    def make(out="out", *, fail_after=None, **wanted):
        oracle = Oracle(*sources, fail_after=fail_after)
        chat, _ = make_chat(answer=oracle, batch_size=4)
        data = GroundingData(**({"data": sources} | wanted))
        return oracle, lambda: run_grounding_suite(chat, tmp_path / out, data, how=Opening(progress=False))

    return make


def test_every_task_of_every_source(run, tmp_path):
    _, go = run()
    result = go()
    assert list(result.sources) == ["kitchen", "street"]
    kitchen, street = result.sources["kitchen"].tasks, result.sources["street"].tasks
    assert set(kitchen) == set(RECORD_TASKS) and set(RECORD_TASKS) - set(street) == {
        "regiontower_reading",
        "regiontower_text_grounding",
    }
    for task in RECORD_TASKS:
        for figures in (found[task] for found in (kitchen, street) if task in found):
            for metric in ("acc50", "em", "rejection", "f1", "exact", "count_acc", "acc", "rouge_l", "ap50"):
                assert figures.get(metric, 1.0) == pytest.approx(1.0), (task, metric)
    assert kitchen["regiontower_counting"]["mae"] == 0.0 and kitchen["regiontower_counting"]["n"] == 4
    assert kitchen["regiontower_several"]["n"] == 2 and kitchen["regiontower_several"]["precision"] == 1.0
    assert "ap50" not in kitchen["regiontower_absent"] and kitchen["regiontower_grounding"]["ece"] > 0
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written == result.results
    assert written["tasks"]["street/regiontower_grounding"] == street["regiontower_grounding"]
    assert len(written["weights_sha256"]) == 64 and written["versions"]["lmms-eval"].startswith("0.7")
    assert written["box_format"] == {"model": "int1000", "scored": "int1000"}
    own = json.loads((tmp_path / "out/kitchen/results.json").read_text())
    groups = own["breakdown"]["regiontower_grounding"]
    assert [(g["group"], g["n"]) for g in groups["by_box_size"]] == [("4 to 16 %", 4), ("over 16 %", 2)]
    assert [(g["group"], g["n"]) for g in groups["by_distractors"]] == [("0", 2), ("1", 4)]
    assert sum(part["n"] for part in own["calibration"]["regiontower_several"]) == 4
    assert (tmp_path / "out/kitchen/samples_regiontower_classify_shape.jsonl").is_file()


def test_killed_in_the_middle_it_asks_only_what_is_missing(run):
    whole, go = run("straight")
    straight = go()
    first, go = run("resumed", fail_after=len(whole.asked) - 10)  # in the second source
    with pytest.raises(RuntimeError, match="power"):
        go()
    second, go = run("resumed")
    resumed = go()
    assert len(first.asked) + len(second.asked) == len(whole.asked) and len(second.asked) <= 14
    assert resumed.tasks == straight.tasks
    for name, source in straight.sources.items():
        assert resumed.sources[name].samples == source.samples
    third, go = run("resumed")  # a finished one is done again
    go()
    assert len(third.asked) == len(whole.asked)


def test_the_report_holds_every_source(run, tmp_path):
    _, go = run()
    go()
    html = (tmp_path / "out/report.html").read_text()
    assert 'href="#part-2"' in html and "kitchen" in html and "street" in html
    for shown in ("by the area of the box", "by other things of the same category", "Is a sure box a right box?"):
        assert html.count(shown) == 2
    glance = html[html.index("At a glance") : html.index('id="part-1"')]
    assert glance.count("<tr>") == 1 + len(RECORD_TASKS)  # a row a task, a cell a source
    reading = next(row for row in glance.split("<tr>") if ">reading<" in row)
    assert reading.count('<td class="figure">') == 2 and reading.count("n = ") == 1  # the street has none
    assert "harmonic mean of precision and recall" in html  # what a figure means stands on the page
    assert html.count("<details>") == 2 * len(RECORD_TASKS) - 2
    assert "2 of 2 found, 2 given" in html and "CIDEr" in html
    assert html.count("data:image/") > 40 and 'src="http' not in html


def test_a_limit_and_a_choice_of_tasks(run):
    oracle, go = run(tasks=["grounding", "counting"], limit=2)
    result = go()
    assert {name: figures["n"] for name, figures in result.tasks.items()} == {
        f"{source}/regiontower_{task}": 2 for source in ("kitchen", "street") for task in ("grounding", "counting")
    }
    assert len(oracle.asked) == 8


def test_a_data_root_is_searched(sources, tmp_path, isolated_cache):
    found, skipped = find_sources(GroundingData(data_root=tmp_path / "data"))
    assert [source.name for source in found] == ["kitchen", "street"]
    assert set(skipped) == {"refcoco", "refcoco+", "refcocog", "flickr30k", "reflvis", "ferret_bench"}
    assert all("its files are at https://" in reason for reason in skipped.values())
    with pytest.raises(UserError, match="lichengunc/refer"):  # asked by name, it must be there
        find_sources(GroundingData(data_root=tmp_path / "data", tasks=["refcoco_val"]))
    with pytest.raises(UserError, match="needs --data-root DIR"):
        find_sources(GroundingData(data=sources, tasks=["refcoco_val"]))
    with pytest.raises(UserError, match="there is no task 'refcocoo'"):
        find_sources(GroundingData(data=sources, tasks=["refcocoo"]))


def test_two_sources_of_one_name_stay_apart(tmp_path, isolated_cache):
    paths = [write_source(tmp_path / side / "kitchen", 0) for side in ("a", "b")]
    found, _ = find_sources(GroundingData(data=paths, tasks=["grounding"]))
    assert [source.name for source in found] == ["kitchen", "kitchen-2"]


def test_official_sets_run_beside_own_records(sources, make_chat, tmp_path):
    """RefCOCO's files with the official number of sentences, asked under a limit."""
    import pickle

    root = tmp_path / "data"
    (root / "refcoco").mkdir()
    (root / "train2014").mkdir()
    Image.new("RGB", SIZE, (0, 0, 0)).save(root / "train2014/x.jpg")
    said = [{"sent": "the left cup"}] * 10_834
    refs = [{"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "val", "sentences": said}]
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    image = {"id": 1, "file_name": "x.jpg", "width": 100, "height": 80}
    cup = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 30]}
    document = {"images": [image], "annotations": [cup], "categories": [{"id": 1, "name": "cup"}]}
    (root / "refcoco/instances.json").write_text(json.dumps(document))
    oracle = Oracle(*sources)
    chat, _ = make_chat(answer=oracle)
    wanted = GroundingData(data_root=root, tasks=["refcoco_val", "reading"], limit=4)
    result = run_grounding_suite(chat, tmp_path / "out", wanted, how=Opening(progress=False))
    assert result.tasks["refcoco/regiontower_refcoco_val"]["n"] == 4
    assert result.tasks["refcoco/regiontower_refcoco_val"]["acc50"] == 1.0
    assert result.tasks["kitchen/regiontower_reading"]["n"] == 2
    assert result.results["sources"]["refcoco"]["data"]["page"].endswith("lichengunc/refer")
