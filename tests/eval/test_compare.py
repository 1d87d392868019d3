import json

import numpy as np
import pytest

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from regiontower.eval.compare import compare, comparison_page, differences, paired_interval
from regiontower.eval.grounding_suite import GroundingData
from regiontower.eval.intervals import ratio_interval
from regiontower.eval.opened import Opening
from regiontower.vision_towers.errors import UserError


def ones(values):
    return [1.0] * len(values)


def test_pairs_tell_what_two_intervals_hide():
    """A hard half and an easy half: the second model is a little better everywhere."""
    rng = np.random.default_rng(0)
    easy = rng.random(400) < 0.5
    first = np.where(easy, rng.random(400) < 0.95, rng.random(400) < 0.05).astype(float)
    second = np.maximum(first, rng.random(400) < 0.04)
    images = list(range(400))
    _, high_first = ratio_interval(first, ones(first), images)
    low_second, _ = ratio_interval(second, ones(second), images)
    assert low_second < high_first  # the two intervals overlap
    difference, low, high = paired_interval((first, ones(first)), (second, ones(second)), images)
    assert difference == pytest.approx(second.mean() - first.mean())
    assert 0 < low < difference < high


def test_about_95_percent_of_paired_intervals_hold_the_truth():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        hard = np.repeat(rng.random(60), 3)  # three questions an image
        first = (rng.random(180) < hard).astype(float)
        second = (rng.random(180) < np.minimum(hard + 0.1, 1.0)).astype(float)
        truth = 0.1 * 0.9 + 0.1 * 0.05  # mean of min(hard + 0.1, 1) - hard, hard uniform on [0, 1]
        _, low, high = paired_interval(
            (first, ones(first)), (second, ones(second)), np.repeat(np.arange(60), 3).tolist()
        )
        inside += low <= truth <= high
    assert 178 <= inside <= 199


def test_the_same_answers_differ_by_nothing():
    values = [0.0, 1.0, 1.0]
    assert paired_interval((values, ones(values)), (values, ones(values)), ["a", "a", "b"]) == (0.0, 0.0, 0.0)


def test_differences_of_ratios():
    rows = [
        {
            "found": 1,
            "predicted": 2,
            "true": 2,
            "twice_found": 2,
            "predicted_and_true": 4,
            "correct": False,
            "parsed": True,
        },
        {
            "found": 2,
            "predicted": 2,
            "true": 2,
            "twice_found": 4,
            "predicted_and_true": 4,
            "correct": True,
            "parsed": True,
        },
    ]
    first = [{**rows[0], "image_id": "a"}, {**rows[0], "image_id": "b"}]
    second = [{**rows[1], "image_id": "a"}, {**rows[0], "image_id": "b"}]
    found = differences("regiontower_several", first, second)
    assert found["precision"]["difference"] == pytest.approx(3 / 4 - 2 / 4)
    assert found["exact"]["ci95"] == [0.0, 1.0]
    silent = [{**row, "predicted": 0, "found": 0} for row in first]
    assert "precision" not in differences("regiontower_several", first, silent)  # no box, no precision


def test_three_models_in_one_table(make_tiny_mllm, records_path, tmp_path):
    models = [make_tiny_mllm(seed) for seed in range(3)]
    out = tmp_path / "out"
    wanted = GroundingData([records_path], tasks=["grounding"], limit=2)
    found = compare(models, out, wanted, how=Opening(batch_size=4, progress=False))
    labels = list(found.models)
    assert len(set(labels)) == 3 and found.results["base"] == labels[0]
    written = json.loads((out / "comparison.json").read_text())
    assert set(written["differences"]) == set(labels[1:])
    for label in labels[1:]:
        for task, metrics in written["differences"][label].items():
            for metric, change in metrics.items():
                own, base = found.models[label].tasks[task][metric], found.models[labels[0]].tasks[task][metric]
                assert change["difference"] == pytest.approx(own - base)
                assert change["ci95"][0] <= change["difference"] <= change["ci95"][1]
    for label, (model, processor) in zip(labels, models, strict=True):
        cost = written["cost"][label]
        count = sum(weight.numel() for weight in model.parameters())
        assert cost["parameters_m"] == pytest.approx(count / 1e6) and cost["weights_mb"] == pytest.approx(
            count * 4 / 2**20
        )
        assert 0 < cost["vision_parameters_m"] < cost["parameters_m"]
        assert cost["image_tokens"] == processor.image_tokens(processor.frame((100, 80))) == 64
        assert cost["first_token_s"] > 0 and cost["answer_s"] > 0 and cost["answer_tokens"] >= 0
        assert (out / label / "results.json").is_file()
    html = (out / "report.html").read_text()
    assert all(html.count(label) > 3 for label in labels) and "image tokens a picture" in html
    # What only one model has (its boxes carry scores) has a row, and nothing for the others.
    figures = found.models[labels[1]].tasks["some data/regiontower_grounding"]
    figures |= {"ap50": 0.4321, "ece": 0.1234}
    page = comparison_page(found.results, found.models)
    assert ">ap50<" in page and ">0.432<" in page.replace("<br", "<") and "ece (lower is better)" in page
    samples = [result.sources for result in found.models.values()]
    rows = [next(iter(source.values())).samples["regiontower_grounding"] for source in samples]
    assert [[row["question"] for row in part] for part in rows] == [[row["question"] for row in rows[0]]] * 3


def test_a_comparison_that_was_cut_off_goes_on(make_tiny_mllm, records_path, tmp_path, monkeypatch):
    from regiontower.eval import compare as module

    models = [make_tiny_mllm(seed) for seed in range(2)]
    wanted = GroundingData([records_path], tasks=["reading"], limit=3)
    real, calls = module.measure_cost, []

    def power_cut(opened, rows):
        calls.append(opened)
        raise RuntimeError("the power went out")

    monkeypatch.setattr(module, "measure_cost", power_cut)
    with pytest.raises(RuntimeError):
        compare(models, tmp_path / "out", wanted, how=Opening(progress=False))
    logs = sorted((tmp_path / "out").glob("*/responses.jsonl"))
    assert len(logs) == 1 and len(logs[0].read_text().splitlines()) == 3
    monkeypatch.setattr(module, "measure_cost", real)
    compare(models, tmp_path / "out", wanted, how=Opening(progress=False))
    assert len(logs[0].read_text().splitlines()) == 3  # nothing was asked twice
    assert (tmp_path / "out/comparison.json").is_file()


def test_one_model_is_no_comparison(tmp_path):
    with pytest.raises(UserError, match="two models or more"):
        compare(["nano"], tmp_path, GroundingData())
