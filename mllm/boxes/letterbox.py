"""The pixels of a letterbox; the geometry is `ImageFrame.letterbox`."""

from collections.abc import Sequence

from PIL import Image

from .frame import ImageFrame, content_size


def letterbox_image(image: Image.Image, side: int, fill: tuple[int, int, int]) -> tuple[Image.Image, ImageFrame]:
    """Fit an image into a `side` x `side` RGB square: bicubic resize without changing its shape, centred, padded.

    Args:
        image: any PIL image, already turned upright (EXIF transpose is the loader's work).
        side: pixels.
        fill: colour of the padding, 0-255; towers are best given their own mean.

    Returns:
        The square image, and the frame that maps boxes of `image` to it and back.
    """
    frame = ImageFrame.letterbox(image.size, side)
    resized = image.convert("RGB").resize(content_size(image.size, side), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), fill)
    square.paste(resized, (int(frame.offset[0]), int(frame.offset[1])))
    return square, frame


def mean_colour(image_mean: Sequence[float]) -> tuple[int, int, int]:
    """The colour (0-255) that a tower's normalisation turns into zero, from its mean in 0..1: the padding."""
    red, green, blue = (round(255 * value) for value in image_mean)
    return red, green, blue
