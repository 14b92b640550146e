"""Every stage of LIBERO's image chain against TensorFlow's results, and Pillow's bicubic against Pillow."""

import builtins

import numpy as np
import pytest

from vla_pruner.preprocessing import libero, resize

CAMERAS = ("full", "wrist")


@pytest.fixture
def stages(golden):
    return np.load(golden / "libero_preprocess" / "golden.npz")


@pytest.fixture
def codecs():
    for name in ("simplejpeg", "PIL"):
        pytest.importorskip(name, reason="LIBERO's JPEG stage needs pillow and simplejpeg (extra libero-images)")


def assert_levels(found, expected, share):
    """At most one level of difference, in at most this share of the values."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert difference.max() <= 1
    assert (difference > 0).mean() <= share


def noise(*shape):
    return np.random.default_rng(5).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("camera", CAMERAS)
def test_jpeg_is_tensorflows_to_the_bit(stages, codecs, camera):
    before = stages[f"{camera}_rot256"]
    np.testing.assert_array_equal(libero.jpeg_round_trip(before), stages[f"{camera}_jpeg256"])


@pytest.mark.parametrize("camera", CAMERAS)
def test_lanczos_is_tensorflows(stages, camera):
    assert_levels(libero.lanczos3_resize(stages[f"{camera}_jpeg256"]), stages[f"{camera}_lanczos224"], 4e-4)


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_center_crop_is_tensorflows(stages, camera):
    assert_levels(libero.center_crop(stages[f"{camera}_lanczos224"]), stages[f"{camera}_crop224"], 2e-5)
    assert_levels(libero.center_crop(stages[f"{camera}_rot256"]), stages[f"{camera}_crop_from256"], 2e-5)


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize(("crop", "stage"), [(True, "crop224"), (False, "lanczos224")])
def test_the_whole_chain_from_the_simulators_image(stages, codecs, camera, crop, stage):
    simulated = stages[f"{camera}_rot256"][::-1, ::-1]
    assert_levels(libero.libero_image(simulated, center_crop=crop), stages[f"{camera}_{stage}"], 4e-4)


def test_rotation_turns_rows_and_columns_but_not_colours():
    image = noise(3, 4)
    found = libero.rotate_180(image)
    assert found[0, 0].tolist() == image[2, 3].tolist()
    np.testing.assert_array_equal(libero.rotate_180(found), image)


def test_a_crop_of_everything_is_the_image_and_the_box_is_in_the_middle():
    image = noise(9, 9)
    np.testing.assert_array_equal(libero.center_crop(image, area=1.0, size=9), image)
    # A quarter of the area of 9 x 9 pixels: rows and columns 2 to 6.
    np.testing.assert_array_equal(libero.center_crop(image, area=0.25, size=5), image[2:7, 2:7])
    np.testing.assert_array_equal(libero.center_crop(image, area=0.25, size=1), image[4:5, 4:5])


def test_lanczos_leaves_constants_and_the_own_size_alone():
    np.testing.assert_array_equal(resize.lanczos3_resize(np.full((64, 48, 3), 77, np.uint8), 30), np.uint8(77))
    image = noise(24, 24)
    np.testing.assert_array_equal(resize.lanczos3_resize(image, 24), image)


def pillows_bicubic(image, height, width):
    """Width, then height, as every Pillow did before 13."""
    image_module = pytest.importorskip("PIL.Image", reason="compares with pillow")
    bicubic = image_module.Resampling.BICUBIC
    return np.asarray(
        image_module.fromarray(image).resize((width, len(image)), bicubic).resize((width, height), bicubic)
    )


@pytest.mark.parametrize(
    "shape", [(256, 256), (480, 640), (640, 360), (224, 224), (224, 300), (100, 224), (64, 48), (1, 1), (7, 1000)]
)
def test_bicubic_is_pillows_to_the_bit(shape):
    for image in (noise(*shape), noise(*shape) // 128 * 255):
        np.testing.assert_array_equal(resize.bicubic_resize(image, (224, 224)), pillows_bicubic(image, 224, 224))


def test_bicubic_takes_sizes_as_height_and_width():
    image = noise(50, 40)
    np.testing.assert_array_equal(resize.bicubic_resize(image, (17, 31)), pillows_bicubic(image, 17, 31))


def test_bicubic_is_the_processors_resize(golden):
    expected = np.load(golden / "openvla_tiny" / "golden.npz")
    for image, resized in zip(expected["images"], expected["image224"], strict=True):
        np.testing.assert_array_equal(resize.bicubic_resize(image, (224, 224)), resized)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((4, 4, 3), np.float32), r"found float32 \(4, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), r"found uint8 \(4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"found uint8 \(0, 4, 3\)"),
        ("image.png", "found str"),
    ],
)
def test_what_is_no_image_is_refused(image, found):
    for stage in (resize.lanczos3_resize, libero.center_crop, libero.jpeg_round_trip):
        with pytest.raises(ValueError, match=found):
            stage(image)
    with pytest.raises(ValueError, match=found):
        resize.bicubic_resize(image, (4, 4))


def test_other_refusals():
    with pytest.raises(ValueError, match=r"needs an RGB image .*; found \(4, 4, 1\)"):
        libero.jpeg_round_trip(np.zeros((4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match=r"above 0 and up to 1; found 1\.5"):
        libero.center_crop(noise(4, 4), area=1.5)
    with pytest.raises(ValueError, match="above 0 and up to 1; found 0"):
        resize.crop_resize(noise(4, 4), side=0)


def test_an_absent_codec_is_named_with_the_pip_line(monkeypatch):
    def refuse(name, *args, **kwargs):
        if name == "simplejpeg":
            raise ModuleNotFoundError("No module named 'simplejpeg'", name="simplejpeg")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"needs simplejpeg: pip install .* or pip install pillow simplejpeg"):
        libero.jpeg_round_trip(noise(16, 16))
