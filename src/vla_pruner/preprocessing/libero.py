"""LIBERO's camera images as OpenVLA and OpenVLA-OFT were trained and evaluated on them, without TensorFlow.

The chain: turn by 180 degrees, through JPEG and back, Lanczos to 224 x 224, the centre of nine tenths of the area. Each
stage agrees with the official TensorFlow functions on golden images to one level in at most 4e-4 of the values; the
JPEG is bit-exact. Only the JPEG needs more than numpy.
"""

from __future__ import annotations

import io
import math

import numpy as np

from vla_pruner.preprocessing.resize import check_image, crop_resize, lanczos3_resize
from vla_pruner.wording import install

__all__ = ["center_crop", "jpeg_round_trip", "lanczos3_resize", "libero_image", "rotate_180"]


def libero_image(image: np.ndarray, center_crop: bool = True) -> np.ndarray:
    """Run the whole chain, from the simulator's image to the processor's input; for each camera.

    Args:
        image: (H, W, 3) uint8 as LIBERO's `agentview_image` and `robot0_eye_in_hand_image`, 256 x 256 in the official
            evaluations. (At 224 x 224 OFT's own script leaves JPEG and resizing out; this does not.)
        center_crop: as the official scripts' flag, true for checkpoints fine-tuned with image augmentation: the
            published LIBERO ones.

    Returns:
        (224, 224, 3) uint8.

    Raises:
        ValueError: the image is not (H, W, 3) uint8.
        ModuleNotFoundError: pillow or simplejpeg is absent; the message has the pip line.
    """
    resized = lanczos3_resize(jpeg_round_trip(rotate_180(image)))
    return _center_crop(resized) if center_crop else resized


def rotate_180(image: np.ndarray) -> np.ndarray:
    """Return the image turned by 180 degrees: the simulator's is upside down. (H, W, C) -> (H, W, C)."""
    return np.ascontiguousarray(image[::-1, ::-1])


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """Return the image as it comes back from JPEG of quality 95 with half the colour resolution: the training data's
    storage.

    TensorFlow decodes with the fast integer transform, which moves most values by a level and some by 17; Pillow cannot
    decode so, but simplejpeg can, to the bit. Pillow's encoder is TensorFlow's to the bit, and simplejpeg's is not.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError, ModuleNotFoundError: as `libero_image`.
    """
    check_image(image)
    if image.shape[2] != 3:
        raise ValueError(f"JPEG needs an RGB image (height, width, 3); found {image.shape}.")
    try:
        import simplejpeg
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"LIBERO's images go through JPEG as in training, which needs {error.name}: "
            f"{install('libero-images')}, or pip install pillow simplejpeg.",
            name=error.name,
        ) from error
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=95, subsampling="4:2:0")
    return simplejpeg.decode_jpeg(encoded.getvalue(), colorspace="RGB", fastdct=True)


def center_crop(image: np.ndarray, area: float = 0.9, size: int = 224) -> np.ndarray:
    """Return the centre of an image, stretched to `size`: the average of the random crops in training.

    Args:
        image: (H, W, C) uint8.
        area: share of the image's area that stays, in (0, 1].
        size: height and width of the result.

    Returns:
        (size, size, C) uint8.

    Raises:
        ValueError: the image is not (H, W, C) uint8, or the area not in (0, 1].
    """
    if not 0.0 < area <= 1.0:
        raise ValueError(f"The area of a crop is a share above 0 and up to 1; found {area}.")
    return crop_resize(image, math.sqrt(area), size)


_center_crop = center_crop  # within libero_image the name is its flag
