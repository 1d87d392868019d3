"""Backgrounds of scenes: crops of photographs that scikit-image, scikit-learn and matplotlib ship inside their wheels,
plain colours, gradients and noise; and bands of ground (grass, gravel, brick, sand) drawn over them.

Only files of the installed wheels are opened, so nothing is downloaded.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from .package_files import package_file

PHOTO_PX = 512  # photographs are kept in memory with at most this longer side


@dataclass(frozen=True)
class Photo:
    """A photograph: where it is, what it is called, and which glyph categories it really shows.

    Categories in `shows` are left out of scenes over this photograph: "flower" would be ambiguous over a real flower.
    """

    package: str
    file: str
    name: str
    shows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Background:
    """A drawn background: its name for captions, and tags ("photo", "plain", ... first)."""

    image: Image.Image
    name: str
    tags: tuple[str, ...]
    shows: tuple[str, ...] = ()


PHOTOS: tuple[Photo, ...] = (
    Photo("skimage", "data/astronaut.png", "astronaut", ("star", "flag", "airplane", "smiley")),
    Photo("skimage", "data/camera.png", "cameraman", ("hand",)),
    Photo("skimage", "data/chelsea.png", "tabby", ("cat",)),
    Photo("skimage", "data/coffee.png", "coffee", ("cup",)),
    Photo("skimage", "data/coins.png", "coins"),
    Photo("skimage", "data/hubble_deep_field.jpg", "galaxies", ("star", "sun", "moon")),
    Photo("skimage", "data/ihc.png", "tissue", ("cloud",)),
    Photo("skimage", "data/moon.png", "craters", ("moon",)),
    Photo("skimage", "data/motorcycle_left.png", "motorcycle", ("gear",)),
    Photo("skimage", "data/retina.jpg", "retina", ("sun", "moon")),
    Photo("skimage", "data/rocket.jpg", "launch pad", ("star", "sun")),
    Photo("sklearn", "datasets/images/china.jpg", "pagoda", ("house", "cloud")),
    Photo("sklearn", "datasets/images/flower.jpg", "dahlia", ("flower",)),
    Photo("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "officer", ("star", "flag", "smiley", "anchor")),
)

# Ground: file (None = made of noise) and the colours of its darkest and lightest parts.
GROUNDS: dict[str, tuple[str | None, tuple[int, int, int], tuple[int, int, int]]] = {
    "grass": ("data/grass.png", (8, 34, 6), (150, 196, 96)),
    "gravel": ("data/gravel.png", (30, 28, 28), (204, 198, 190)),
    "brick": ("data/brick.png", (58, 22, 14), (214, 150, 124)),
    "sand": (None, (176, 146, 96), (236, 214, 168)),
}


@cache
def _photo(package: str, file: str) -> Image.Image:
    """A photograph as RGB, at most `PHOTO_PX` on its longer side; kept for the process's life."""
    with Image.open(package_file(package, file)) as opened:
        image = opened.convert("RGB")
    scale = PHOTO_PX / max(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image


def draw_background(rng: np.random.Generator, size: tuple[int, int], photo_share: float) -> Background:
    """A random background of `size` (width, height): a photograph with probability `photo_share`."""
    if rng.random() < photo_share:
        return _photo_background(rng, size, PHOTOS[rng.integers(len(PHOTOS))])
    return (_plain, _gradient, _noise)[rng.integers(3)](rng, size)


def _photo_background(rng: np.random.Generator, size: tuple[int, int], photo: Photo) -> Background:
    """A random crop of a photograph: 45-100 % of the largest crop of this aspect, perhaps mirrored, changed in
    brightness and tint."""
    source = _photo(photo.package, photo.file)
    width, height = size
    most = min(source.width / width, source.height / height)
    zoom = most * rng.uniform(0.45, 1.0)
    crop_width, crop_height = width * zoom, height * zoom
    left = rng.uniform(0, source.width - crop_width)
    top = rng.uniform(0, source.height - crop_height)
    box = (left, top, min(left + crop_width, source.width), min(top + crop_height, source.height))
    image = source.resize(size, Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    # One look-up table does brightness, a little contrast and tint at once.
    gain = rng.uniform(0.6, 1.15) * rng.uniform(0.88, 1.12, 3)
    lift = rng.uniform(0, 30)
    levels = np.arange(256)
    table = [np.clip(levels * channel + lift, 0, 255).astype(int) for channel in gain]
    image = image.point(np.concatenate(table).tolist())
    if rng.random() < 0.3:
        image = ImageEnhance.Color(image).enhance(float(rng.uniform(0.3, 0.9)))
    return Background(image, f"a photo of {_article(photo.name)}", ("photo", photo.name), photo.shows)


def _article(name: str) -> str:
    """ "a tabby", "an astronaut"; names of things that are many or a mass stand alone."""
    if name in ("coins", "galaxies", "craters", "coffee", "tissue"):
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _soft_color(rng: np.random.Generator) -> np.ndarray:
    """A colour without much saturation, so that it is none of the colours of objects. (3,) float."""
    return rng.uniform(60, 215) + rng.uniform(-28, 28, 3)


def _to_image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _plain(rng: np.random.Generator, size: tuple[int, int]) -> Background:
    color = tuple(int(v) for v in np.clip(_soft_color(rng), 0, 255))
    return Background(Image.new("RGB", size, color), "a plain background", ("plain",))


def _gradient(rng: np.random.Generator, size: tuple[int, int]) -> Background:
    first, second, angle = _soft_color(rng), _soft_color(rng), rng.uniform(0, 2 * np.pi)
    x, y = np.linspace(-0.5, 0.5, size[0]), np.linspace(-0.5, 0.5, size[1])[:, None]
    weight = np.clip(0.5 + x * np.cos(angle) + y * np.sin(angle), 0, 1)[..., None]
    return Background(_to_image(first + (second - first) * weight), "a smooth gradient", ("gradient",))


def _noise(rng: np.random.Generator, size: tuple[int, int]) -> Background:
    cells = int(rng.integers(8, 48))
    coarse = rng.normal(0, rng.uniform(15, 35), (cells, cells, 1)) + rng.normal(0, 8, (cells, cells, 3))
    image = _to_image(_soft_color(rng) + coarse).resize(size, Image.Resampling.BICUBIC)
    return Background(image, "a noise pattern", ("noise",))


def draw_ground(rng: np.random.Generator, background: Background) -> tuple[str, np.ndarray]:
    """Draw a band of ground along the bottom of `background.image`, in place.

    Returns its category and its mask, bool (height, width): 18-38 % of the height under a gently waving edge.
    """
    category = tuple(GROUNDS)[rng.integers(len(GROUNDS))]
    file, dark, light = GROUNDS[category]
    width, height = background.image.size
    edge = height * (1 - rng.uniform(0.22, 0.34))
    x = np.arange(width)
    wave = np.sin(x / width * 2 * np.pi * rng.uniform(0.3, 1.5) + rng.uniform(0, 2 * np.pi))
    line = np.clip(edge + height * rng.uniform(0, 0.04) * wave, 0, height - 1).round().astype(int)
    top = int(line.min())
    size = (width, height - top)
    if file is None:
        grain = rng.normal(128, 34, (size[1], size[0])).clip(0, 255).astype(np.uint8)
        texture = Image.fromarray(grain)
    else:
        texture = _ground_crop(rng, _photo("skimage", file), size)
    band = ImageOps.colorize(texture, dark, light)
    mask = np.arange(height)[:, None] >= line[None]
    background.image.paste(band, (0, top), Image.fromarray(mask[top:].astype(np.uint8) * 255))
    ImageDraw.Draw(background.image).line([*zip(x.tolist(), line.tolist(), strict=True)], fill=dark)
    return category, mask


def _ground_crop(rng: np.random.Generator, source: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A random crop of a grey texture at its own or half scale, stretched to `size`; L."""
    zoom = rng.uniform(0.6, 1.0) * min(source.width / size[0], source.height / size[1])
    width, height = size[0] * zoom, size[1] * zoom
    left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
    box = (left, top, min(left + width, source.width), min(top + height, source.height))
    return ImageOps.autocontrast(source.resize(size, Image.Resampling.BILINEAR, box=box).convert("L"))
