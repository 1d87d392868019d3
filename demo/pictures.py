"""Pictures inside of pages, as data: nothing a user shows is written to a file that another could ask for."""

from __future__ import annotations

import base64
import io

from PIL import Image

SHOWN_SIDE = 1600  # pixels; a larger picture is shown smaller, while boxes stay in its own pixels


def data_url(image: Image.Image, *, exact: bool = False) -> str:
    """The picture as a `data:` address: JPEG, at most `SHOWN_SIDE` pixels a side; PNG in full size when `exact`."""
    file = io.BytesIO()
    if exact:
        image.save(file, "PNG")
    else:
        shown = image.convert("RGB")
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        shown.save(file, "JPEG", quality=90, subsampling=0)
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
