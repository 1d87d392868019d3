import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from regiontower.train_stages.record_io import (
    data_hash,
    load_record_image,
    read_records,
    stream_records,
    write_records,
)
from regiontower.train_stages.records import PointLabel, Record, Region
from regiontower.vision_towers.errors import UserError


def make_record(**fields) -> Record:
    return Record.model_validate({"image": "a.png", "width": 100, "height": 80, **fields})


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: text.strip())
word_lists = st.lists(words, max_size=3)


@st.composite
def records(draw) -> Record:
    width, height = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))

    def interval(side: int) -> tuple[float, float]:
        ends = draw(st.tuples(st.floats(0, side), st.floats(0, side)).filter(lambda pair: pair[0] != pair[1]))
        return min(ends), max(ends)

    def region() -> Region:
        (x0, x1), (y0, y1) = interval(width), interval(height)
        mask = {"size": [height, width], "counts": [0, height * width]} if draw(st.booleans()) else None
        return Region.model_validate(
            {
                "box_xyxy": (x0, y0, x1, y1),
                "category": draw(st.none() | words),
                "stuff": draw(st.booleans()),
                "texts": draw(word_lists),
                "captions": draw(word_lists),
                "tags": draw(word_lists),
                "ocr": draw(st.none() | words),
                "mask": mask,
                "cluster": draw(st.none() | st.integers(0, 10**6)),
                "score": draw(st.none() | st.floats(-1e9, 1e9)),
                "source": draw(st.none() | words),
            }
        )

    points = st.builds(PointLabel, xy=st.tuples(st.floats(0, width), st.floats(0, height)), texts=word_lists)
    return Record(
        image=draw(words),
        width=width,
        height=height,
        split=draw(st.none() | words),
        captions=draw(word_lists),
        tags=draw(word_lists),
        points=draw(st.lists(points, max_size=2)),
        regions=[region() for _ in range(draw(st.integers(0, 3)))],
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(records(), min_size=1, max_size=4))
def test_what_is_written_is_read_back_exactly(tmp_path, originals):
    path = tmp_path / "records.jsonl"
    assert write_records(path, originals) == len(originals)
    found = read_records(path)
    assert found.records == originals
    assert found.bad == []
    assert list(stream_records(path)) == originals


def write_lines(path: Path, good: int, bad: int) -> Path:
    good_line = make_record().model_dump_json(exclude_defaults=True)
    bad_line = '{"image": "a.png", "width": 100, "height": 80, "regions": [{"box_xyxy": [9, 9, 8, 8]}]}'
    path.write_text("\n".join([good_line] * good + [""] + [bad_line] * bad))
    return path


@pytest.mark.parametrize(("good", "bad", "stops"), [(20, 5, False), (20, 6, True), (1300, 13, False), (1300, 14, True)])
def test_more_than_five_and_more_than_one_percent_bad_stops(tmp_path, good, bad, stops):
    path = write_lines(tmp_path / "r.jsonl", good, bad)
    if stops:
        with pytest.raises(UserError) as caught:
            read_records(path)
        message = str(caught.value)
        assert f"{bad} of {good + bad} records are bad" in message
        assert message.count("inverted") == min(bad, 10)
        assert f"line {good + 2}: regions[0].box_xyxy" in message
        assert ("and 4 more" in message) == (bad == 14)
    else:
        found = read_records(path)
        assert (len(found), len(found.bad)) == (good, bad)
        assert found.summary().startswith(f"{good} records, {bad} bad: line {good + 2}: ")


def test_summary_of_a_clean_file(tmp_path):
    assert read_records(write_lines(tmp_path / "r.jsonl", 3, 0)).summary() == "3 records, 0 bad"


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"\xff\xfe", b'{"image": "a", "width": NaN, "height": 3}', b"[" * 100_000, b"9" * 9999]
)
def test_a_line_that_is_no_record_is_skipped_and_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + make_record().model_dump_json().encode() + b"\r\n" + line + b"\n")
    found = read_records(path)
    assert len(found) == 1
    assert [bad.line for bad in found.bad] == ["line 2"]
    assert "\n" not in found.summary()


def test_files_without_a_usable_record_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="no record in it"):
        read_records(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="none of its 2 records can be used"):
        read_records(write_lines(tmp_path / "bad.jsonl", 0, 2))
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path / "nowhere" / "missing.jsonl")
    with pytest.raises(UserError, match="image_root must be the folder"):
        read_records(write_lines(tmp_path / "good.jsonl", 1, 0), image_root=tmp_path / "nowhere")


def test_unknown_formats_and_options_are_refused(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", 1, 0)
    with pytest.raises(UserError, match="did you mean 'records'"):
        read_records(path, format="record")
    with pytest.raises(UserError, match="captions_path"):
        read_records(path, captions_path=path)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    write_records(path, [make_record()])
    before = path.read_bytes()

    def breaks_half_way():
        yield make_record(captions=["new"])
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_records(path, breaks_half_way())
    spoilt = make_record()
    spoilt.regions.append(Region(box_xyxy=(0, 0, 500, 5)))
    with pytest.raises(ValueError, match=r"record 1 \(a.png\).*outside"):
        write_records(path, [make_record(), spoilt])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["records.jsonl"]


def test_defaults_are_not_written(tmp_path):
    write_records(tmp_path / "r.jsonl", [make_record(regions=[{"box_xyxy": [0, 0, 1, 1], "stuff": True}])])
    assert json.loads((tmp_path / "r.jsonl").read_text()) == {
        "image": "a.png",
        "width": 100,
        "height": 80,
        "regions": [{"box_xyxy": [0, 0, 1, 1], "stuff": True}],
    }


# --- images of records


@pytest.fixture
def three_images(tmp_path) -> Path:
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    Image.new("RGB", (80, 100)).save(tmp_path / "b.png")
    write_records(tmp_path / "r.jsonl", [make_record(image=f"{name}.png") for name in "abc"])
    return tmp_path / "r.jsonl"


def test_checked_images_that_disagree_or_are_missing_make_bad_records(three_images):
    unchecked = read_records(three_images)
    assert len(unchecked) == 3
    found = read_records(three_images, check_images=True)
    assert [record.image for record in found.records] == ["a.png"]
    assert [bad.line for bad in found.bad] == ["line 2", "line 3"]
    assert "80 x 100 after EXIF transpose, but the record says 100 x 80" in found.bad[0].reason
    assert f"image_root {three_images.parent}" in found.bad[1].reason

    assert load_record_image(unchecked.root, unchecked.records[0]).size == (100, 80)
    for record, reason in zip(unchecked.records[1:], ("80 x 100", "no such file"), strict=True):
        with pytest.raises(UserError, match=f"record of {record.image}.*{reason}"):
            load_record_image(unchecked.root, record)


def test_image_root_replaces_the_folder_of_the_file(three_images, tmp_path):
    other = tmp_path / "elsewhere" / "r.jsonl"
    write_records(other, [make_record(), make_record(image=str(tmp_path / "a.png"))])
    assert len(read_records(other, image_root=tmp_path, check_images=True)) == 2
    assert [bad.line for bad in read_records(other, check_images=True).bad] == ["line 1"]  # the absolute one is found


def test_data_hash_sees_lines_names_and_sizes_of_images(three_images):
    first = data_hash(three_images)
    assert first == data_hash(read_records(three_images))
    assert len(first) == 64
    (three_images.parent / "c.png").write_bytes(b"now it is there")
    second = data_hash(three_images)
    three_images.write_text(three_images.read_text() + "\n")
    third = data_hash(three_images)
    assert len({first, second, third}) == 3
