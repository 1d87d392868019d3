"""What scenes are made of, and what a preset promises, counted over many of them."""

import io
import os
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from regiontower.train_stages.scenes import (
    CATEGORIES,
    COLORS,
    PRESETS,
    SEEN_WORDS,
    SIGN,
    UNSEEN_WORDS,
    ScenePreset,
    generate_scene,
    plural,
    scene_page,
)
from regiontower.train_stages.scenes.backgrounds import GROUNDS, PHOTOS
from regiontower.train_stages.scenes.expressions import EXTREMES, RELATIONS, SIZES
from regiontower.train_stages.scenes.glyphs import CONTRAST, GLYPHS, SIGN_FONTS, glyph_layers
from regiontower.train_stages.scenes.package_files import package_file
from regiontower.vision_towers.errors import UserError

COUNT = 160


@pytest.fixture(scope="module")
def scenes():
    return [generate_scene(seed) for seed in range(5000, 5000 + COUNT)]


def objects(scene):
    return [region for region in scene.record.regions if not region.stuff]


def mask_box(mask):
    ys, xs = np.nonzero(mask)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


# --- the ingredients ---------------------------------------------------------------------------------------------


def test_default_preset_is_as_fixed():
    default = PRESETS["default"]
    assert default == ScenePreset(
        name="default",
        image_px=(256, 448),
        max_aspect=4 / 3,
        objects=(3, 7),
        signs=(1, 2),
        side=(0.10, 0.45),
        glyph_long_side=(0.16, 0.42),
        sign_width=(0.28, 0.43),
        photo_share=0.9,
        stuff_share=0.3,
        distractor_share=0.75,
        twin_share=0.25,
        overlap_share=0.15,
        max_cover=0.25,
        max_angle=15.0,
    )
    assert len(CATEGORIES) >= 30 and len(COLORS) == 6


def test_word_lists():
    assert len(SEEN_WORDS) >= 200 and len(UNSEEN_WORDS) == 50
    words = SEEN_WORDS + UNSEEN_WORDS
    assert len(set(words)) == len(words)
    assert all(word.isalpha() and word.islower() and 3 <= len(word) <= 6 for word in words)
    grammar = " ".join([*CATEGORIES, *COLORS, *EXTREMES, *SIZES, *RELATIONS, *map(plural, CATEGORIES), SIGN]).split()
    assert not set(words) & set(grammar)
    assert set("".join(UNSEEN_WORDS)) <= set("".join(SEEN_WORDS)), "an unseen word must not need an unseen letter"


def test_every_glyph_renders_and_no_two_look_alike():
    drawings = {}
    for category in CATEGORIES:
        body, ink = glyph_layers(category)
        painted, drawn = np.asarray(body) > 127, np.asarray(ink) > 127
        assert painted.any() and (drawn <= painted).all()
        assert drawn.sum() > 0.3 * painted.sum(), f"{category}: too little of its own colour"
        drawings[category] = np.asarray(ink.resize((48, 48))) > 127
    for first, second in combinations(CATEGORIES, 2):
        a, b = drawings[first], drawings[second]
        assert (a & b).sum() / (a | b).sum() < 0.85, f"{first} and {second} look alike"
    # A character that the font lacks is drawn as its "missing" box, which would pass as an ordinary drawing above.
    from fontTools.ttLib import TTFont  # matplotlib depends on it

    known = TTFont(package_file("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf")).getBestCmap()
    assert all(ord(glyph.char) in known for glyph in GLYPHS.values())


def test_colors_are_far_apart_and_stand_out_from_their_rim():
    for (_, a), (_, b) in combinations(COLORS.items(), 2):
        assert np.abs(np.subtract(a, b)).max() > 100
    for color, rgb in COLORS.items():
        assert np.abs(np.subtract(rgb, CONTRAST[color])).max() > 100


def test_every_background_and_font_is_a_file_of_an_installed_wheel():
    from importlib.metadata import files

    shipped = {str(file) for name in ("scikit-image", "scikit-learn", "matplotlib") for file in files(name) or []}
    assert len(PHOTOS) >= 10
    grounds = [("skimage", file) for file, _, _ in GROUNDS.values() if file]
    fonts = [("matplotlib", f"mpl-data/fonts/ttf/{font}") for font in SIGN_FONTS]
    for package, file in [(photo.package, photo.file) for photo in PHOTOS] + grounds + fonts:
        assert f"{package}/{file}" in shipped
        assert os.path.getsize(package_file(package, file)) > 10_000
    with pytest.raises(UserError, match=r"no\.png of the Python package skimage"):
        package_file("skimage", "no.png")


# --- what the default preset promises ----------------------------------------------------------------------------


def test_sizes_of_images_and_numbers_of_objects(scenes):
    numbers, aspects = Counter(), []
    for scene in scenes:
        record = scene.record
        assert scene.image.size == (record.width, record.height) and scene.image.mode == "RGB"
        assert min(scene.image.size) >= 256 and max(scene.image.size) <= 448
        aspects.append(record.width / record.height)
        assert 3 / 4 - 1e-9 <= aspects[-1] <= 4 / 3 + 1e-9
        numbers[len(objects(scene))] += 1
        assert 1 <= sum(region.category == SIGN for region in objects(scene)) <= 2
    assert set(numbers) == {3, 4, 5, 6, 7}
    assert min(aspects) < 0.85 and max(aspects) > 1.18


def test_sides_are_10_to_45_percent_of_the_shorter_side(scenes):
    for scene in scenes:
        short = min(scene.image.size)
        for region in objects(scene):
            x0, y0, x1, y1 = region.box_xyxy
            for side in (x1 - x0, y1 - y0):
                assert 0.10 * short <= side <= 0.45 * short


def test_shares_of_photos_bands_distractors_and_several_referents(scenes):
    photo = sum(scene.record.tags[0] == "photo" for scene in scenes) / COUNT
    band = sum(any(region.stuff for region in scene.record.regions) for scene in scenes) / COUNT
    # Two signs do not count as a distractor here: glyphs alone must make up the half.
    pairs = [Counter(r.category for r in objects(scene) if r.category != SIGN).most_common(1) for scene in scenes]
    distractor = sum(bool(pair) and pair[0][1] >= 2 for pair in pairs) / COUNT
    assert photo >= 0.80
    assert 0.15 <= band <= 0.45
    assert distractor >= 0.5
    assert {tag for scene in scenes for tag in scene.record.tags} >= {"plain", "gradient", "noise", "ground"}


def test_distractors_differ_in_color_size_or_place(scenes):
    for scene in scenes:
        for a, b in combinations(objects(scene), 2):
            assert a.category != b.category or a.box_xyxy != b.box_xyxy


def test_every_category_color_and_ground_occurs(scenes):
    regions = [region for scene in scenes for region in scene.record.regions]
    assert {region.category for region in regions} == {*CATEGORIES, SIGN, *GROUNDS}
    assert {region.tags[1] for region in regions if not region.stuff} == set(COLORS)


def test_boxes_are_tight_around_masks_and_masks_do_not_overlap(scenes):
    for scene in scenes:
        masks = [region.mask.to_array() for region in scene.record.regions]
        assert np.sum(masks, axis=0).max() <= 1
        for region, mask in zip(scene.record.regions, masks, strict=True):
            assert region.box_xyxy == mask_box(mask)


def test_masks_lie_on_pixels_of_their_color(scenes):
    """The picture and the record agree: pixels of a mask are the object's colour, its rim's, or a mix of the two."""
    for scene in scenes[:40]:
        pixels = np.asarray(scene.image).astype(float)
        for region in objects(scene):
            inside = pixels[region.mask.to_array()]
            color, rim = np.array(COLORS[region.tags[1]]), np.array(CONTRAST[region.tags[1]])
            mix = np.clip((inside - rim) @ (color - rim) / ((color - rim) @ (color - rim)), 0, 1)
            distance = np.linalg.norm(inside - (rim + mix[:, None] * (color - rim)), axis=1)
            assert (distance < 40).mean() > 0.8  # the outermost pixels are half background
            assert (mix > 0.8).mean() > 0.1, f"{region.tags[1]} {region.category}"


def test_occlusion_is_bounded_and_signs_are_never_covered(scenes):
    covered = [part for scene in scenes for part in scene.covered]
    assert max(covered) <= 0.25
    assert sum(part > 0.03 for part in covered) > 0.02 * len(covered), "occlusion should occur"
    for scene in scenes:
        assert len(scene.covered) == len(scene.record.regions)
        for region, part in zip(scene.record.regions, scene.covered, strict=True):
            assert part >= 0 and (region.category != SIGN or part == 0)


def test_grounds(scenes):
    bands = [(scene, region) for scene in scenes for region in scene.record.regions if region.stuff]
    for scene, region in bands:
        assert region.category in GROUNDS and region.tags == [region.category, "ground"]
        assert region.texts == [] and region.captions
        assert region.category in scene.record.tags
        assert region.box_xyxy[3] > 0.9 * scene.record.height
        assert region.mask.to_array().mean() > 0.05


def test_points_lie_well_inside_their_object(scenes):
    for scene in scenes:
        assert 1 <= len(scene.record.points) <= 2
        texts = Counter(text for region in objects(scene) for text in region.texts)
        for point in scene.record.points:
            x, y = (int(value) for value in point.xy)
            owner = next(region for region in objects(scene) if region.mask.to_array()[y, x])
            assert set(point.texts) == {text for text in owner.texts if texts[text] == 1} and point.texts
            mask = np.pad(owner.mask.to_array(), 1)
            assert mask[y : y + 3, x + 1].all() and mask[y + 1, x : x + 3].all()


def test_captions_name_every_object_word_and_background(scenes):
    for scene in scenes:
        first, second = scene.record.captions
        assert first != second
        for caption in (first, second):
            for region in objects(scene):
                color, category = region.tags[1], region.category
                names = (f"{color} {category}", f"{color} {plural(category)}")
                assert any(name in caption.lower() for name in names)
                assert region.ocr is None or f'"{region.ocr}"' in caption
            for tag in scene.record.tags:
                assert tag in caption.lower() or tag == "ground"
        for region in objects(scene):
            assert all(f"{region.tags[1]} {region.category}" in caption for caption in region.captions)


def test_no_category_that_the_photograph_shows(scenes):
    shows = {photo.name: photo.shows for photo in PHOTOS}
    for scene in scenes:
        for category in (category for tag in scene.record.tags for category in shows.get(tag, ())):
            assert all(region.category != category for region in scene.record.regions)
            assert not any(text.endswith(category) for text in scene.record.absent)


@pytest.mark.parametrize(("words", "own", "other"), [("seen", SEEN_WORDS, UNSEEN_WORDS), ("unseen", UNSEEN_WORDS, ())])
def test_words_come_from_their_list_alone(words, own, other):
    transcripts = set()
    for seed in range(60):
        record = generate_scene(seed, words=words).record
        text = record.model_dump_json(exclude={"regions": {"__all__": {"mask"}}})
        quoted = set(text.split('\\"')[1::2])
        transcripts |= quoted
        assert {region.ocr for region in record.regions if region.ocr} <= quoted
    assert transcripts <= set(own) and not transcripts & set(other)
    assert len(transcripts) > 30


@pytest.mark.parametrize("name", ["easy", "single"])
def test_easier_presets_keep_their_own_promises(name):
    rules = PRESETS[name]
    for seed in range(40):
        scene = generate_scene(seed, name)
        assert rules.objects[0] <= len(objects(scene)) <= rules.objects[1]
        assert max(scene.covered) == 0
        for region in objects(scene):
            x0, y0, x1, y1 = region.box_xyxy
            for side in (x1 - x0, y1 - y0):
                assert rules.side[0] <= side / min(scene.image.size) <= rules.side[1]


def test_scene_page_shows_every_scene(scenes):
    page = scene_page(scenes[:3], columns=2)
    assert page.mode == "RGB" and page.width == 2 * (page.width // 2)
    page.save(io.BytesIO(), "PNG")
    pixels = np.asarray(page)
    for column, row in ((0, 0), (1, 0), (0, 1)):
        cell = pixels[row * page.height // 2 :, column * page.width // 2 :][:200, :200]
        assert cell.std() > 5
    assert (pixels[page.height // 2 :, page.width // 2 :] == 255).all()
