"""Self-contained pages: templates, style and scripts of this folder put together in one file."""

from __future__ import annotations

import base64
import io
import json
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from vla_pruner.errors import VLAPrunerError
from vla_pruner.wording import install


class ImagesUnavailable(VLAPrunerError, ImportError):
    """Images cannot be written because Pillow is not installed."""


def source(name: str) -> str:
    """Return the text of a file of this folder."""
    return resources.files("vla_pruner.report").joinpath(name).read_text(encoding="utf-8")


def fill(name: str, **parts: object) -> str:
    """Return a template with its placeholders filled in; the caller has escaped them."""
    return Template(source(name)).substitute(parts)


def script_json(content: Any) -> str:
    """Return JSON that is safe inside of a script element."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def jpeg(image: np.ndarray, largest: int | None = None, quality: int = 85) -> str:
    """Return an image as base64 text of a JPEG.

    Args:
        image: (H, W, 3) uint8.
        largest: pixels of its longer side, beyond which it is made smaller; None: as it is.

    Raises:
        ImagesUnavailable: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImagesUnavailable(
            f"The report's images need Pillow, which is not installed; run: {install('eval')}"
        ) from error
    picture = Image.fromarray(image)
    if largest is not None:
        picture.thumbnail((largest, largest))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
