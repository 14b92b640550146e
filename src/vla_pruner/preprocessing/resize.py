"""Resampling as Pillow and TensorFlow do it, in numpy: policies see single levels, so these agree to that."""

from __future__ import annotations

import math

import numpy as np

_PRECISION = 22
"""The fractional bits of Pillow's 8-bit resampling: 32 less 8 for the pixel and 2 for weights that overshoot."""


def bicubic_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize bicubically with antialiasing, bit for bit as Pillow's `Image.resize(..., BICUBIC)`.

    Pillow works in two passes, the width first, in integers: the weights are rounded to 22 fractional bits, and each
    pass rounds its result to 8 bits. A pass that would change nothing is left out. Pillow 13 takes the height first if
    it shrinks much more than the width (its pull request 9549), which moves some values by a level or a few; the
    policies were trained with the older order, so that is the one here.

    Args:
        image: (H, W, C) uint8.
        size: (height, width) of the result.

    Returns:
        (height, width, C) uint8.

    Raises:
        ValueError: the image is not (H, W, C) uint8.
    """
    check_image(image)
    height, width = size
    for axis, target in ((1, width), (0, height)):
        if image.shape[axis] != target:
            image = _bicubic_pass(image, axis, target)
    return image


def lanczos3_resize(image: np.ndarray, size: int = 224) -> np.ndarray:
    """Resize by Lanczos with radius 3 and antialiasing as `tf.image.resize`, rounded and clipped to uint8.

    It works in float32 and down the rows first, as TensorFlow does; one level of difference remains in up to 4e-4 of
    the values.

    Args:
        image: (H, W, C) uint8.
        size: height and width of the result.

    Returns:
        (size, size, C) uint8.

    Raises:
        ValueError: the image is not (H, W, C) uint8.
    """
    check_image(image)
    values = image.astype(np.float32)
    for axis in (0, 1):
        values = _weighted(values, axis, *_lanczos3_weights(image.shape[axis], size))
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def crop_resize(image: np.ndarray, side: float, size: int = 224) -> np.ndarray:
    """Return the centre of an image, stretched to `size` bilinearly, as `tf.image.crop_and_resize` and back to uint8.

    The corners of the box fall on the corner pixels of the result, and nothing is antialiased. Colours go through
    [0, 1] and come back as floor(255.5 x value), as TensorFlow converts them.

    Args:
        image: (H, W, C) uint8.
        side: of the box, as a fraction of each of the image's sides.
        size: height and width of the result.

    Returns:
        (size, size, C) uint8.

    Raises:
        ValueError: the image is not (H, W, C) uint8, or the side is not in (0, 1].
    """
    check_image(image)
    if not 0.0 < side <= 1.0:
        raise ValueError(f"The side of a crop is a fraction above 0 and up to 1; found {side}.")
    values = image.astype(np.float32) * np.float32(1 / 255)
    start = (np.float32(1) - np.float32(side)) / np.float32(2)
    stop = start + np.float32(side)
    # TensorFlow interpolates along a row before it does between rows.
    for axis in (1, 0):
        last = np.float32(image.shape[axis] - 1)
        step = (stop - start) * last / np.float32(size - 1) if size > 1 else np.float32(0)
        origin = start * last if size > 1 else np.float32(0.5) * (start + stop) * last
        places = origin + np.arange(size, dtype=np.float32) * step
        below = np.floor(places).astype(np.int64)
        above = np.ceil(places).astype(np.int64)
        share = _along(places - below.astype(np.float32), axis, values.ndim)
        low, high = values.take(below, axis), values.take(above, axis)
        values = low + (high - low) * share
    return np.floor(np.clip(values, 0, 1) * np.float32(255.5)).astype(np.uint8)


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless the image is a numpy array (H, W, C) of uint8 that holds pixels."""
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.dtype != np.uint8 or not image.size:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"An image is a numpy array (height, width, channels) of uint8 from 0 to 255; found {found}.")


def _bicubic_pass(image: np.ndarray, axis: int, target: int) -> np.ndarray:
    sources, weights = _bicubic_weights(image.shape[axis], target)
    # Pillow rounds half away from zero, and its shift of a negative sum rounds down; int32 holds every sum.
    fixed = np.trunc(weights * (1 << _PRECISION) + np.copysign(0.5, weights)).astype(np.int32)
    total = np.full((*image.shape[:axis], target, *image.shape[axis + 1 :]), 1 << (_PRECISION - 1), dtype=np.int32)
    for source, weight in zip(sources, fixed, strict=True):
        total += image.take(source, axis).astype(np.int32) * _along(weight, axis, image.ndim)
    return np.clip(total >> _PRECISION, 0, 255).astype(np.uint8)


def _bicubic_weights(length: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Return source pixels and their weights, (taps, target) each; taps outside the image weigh nothing."""
    scale = length / target
    stretch = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    support = 2.0 * stretch
    first = np.maximum(np.trunc(centres - support + 0.5).astype(np.int64), 0)
    stop = np.minimum(np.trunc(centres + support + 0.5).astype(np.int64), length)
    sources = first + np.arange(int((stop - first).max()))[:, None]
    x = np.abs((sources - centres + 0.5) * (1.0 / stretch))
    a = -0.5
    inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    outer = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    weights = np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))
    return _within(sources, weights, stop, length)


def _lanczos3_weights(length: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the same as `_bicubic_weights` for Lanczos, in float32."""
    scale = np.float32(1) / (np.float32(target) / np.float32(length))
    stretch = max(scale, np.float32(1))
    centres = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale
    reach = np.float32(3) * stretch
    first = np.maximum(np.ceil(centres - reach - np.float32(0.5)).astype(np.int64), 0)
    stop = np.minimum(np.floor(centres + reach - np.float32(0.5)).astype(np.int64) + 1, length)
    sources = first + np.arange(int((stop - first).max()))[:, None]
    x = np.abs((sources.astype(np.float32) + np.float32(0.5) - centres) / stretch)
    angle = np.float32(math.pi) * x
    with np.errstate(divide="ignore", invalid="ignore"):
        curve = np.float32(3) * np.sin(angle) * np.sin(angle / np.float32(3)) / (angle * angle)
    weights = np.where(x > 3, np.float32(0), np.where(x <= np.float32(1e-3), np.float32(1), curve))
    return _within(sources, weights, stop, length)


def _within(sources: np.ndarray, weights: np.ndarray, stop: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Give taps past a row's own stop no weight, and scale the rest of the row to a sum of one."""
    weights = np.where(sources < stop, weights, weights.dtype.type(0))
    return np.minimum(sources, length - 1), weights / weights.sum(axis=0)


def _weighted(values: np.ndarray, axis: int, sources: np.ndarray, weights: np.ndarray) -> np.ndarray:
    shape = (*values.shape[:axis], sources.shape[1], *values.shape[axis + 1 :])
    total = np.zeros(shape, dtype=values.dtype)
    for source, weight in zip(sources, weights, strict=True):
        total += values.take(source, axis) * _along(weight, axis, values.ndim)
    return total


def _along(vector: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """Return a vector shaped so that it multiplies along `axis`."""
    return vector.reshape([-1 if dimension == axis else 1 for dimension in range(ndim)])
