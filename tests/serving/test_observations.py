"""Keys of LIBERO's, DROID's and ALOHA's clients, and refusals before a message reaches a model."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vla_pruner.client.codec import pack, unpack
from vla_pruner.errors import ObservationError, VLAPrunerError
from vla_pruner.models.openvla import random_openvla
from vla_pruner.serving.errors import ServingError
from vla_pruner.serving.observations import LONGEST_STATE, reader_of
from vla_pruner.strangers import Unread


def fake(cameras: tuple[str, ...], proprio_size: int | None) -> Any:
    return SimpleNamespace(cameras=cameras, proprio_size=proprio_size)


def image(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (6, 8, 3), dtype=np.uint8)


def test_droid() -> None:
    reader = reader_of(fake(("base_0_rgb", "left_wrist_0_rgb"), 8), "droid")
    sent = {
        "observation/exterior_image_1_left": image(1),
        "observation/wrist_image_left": image(2),
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.array([0.5]),
        "prompt": "fold the towel",
    }
    seen = reader.read(unpack(pack(sent)))
    assert list(seen.images) == ["base_0_rgb", "left_wrist_0_rgb"]
    assert np.array_equal(seen.images["base_0_rgb"], image(1))
    assert np.array_equal(seen.images["left_wrist_0_rgb"], image(2))
    assert seen.proprio is not None
    assert seen.proprio.tolist() == [0, 1, 2, 3, 4, 5, 6, 0.5]
    assert seen.proprio.dtype == np.float32
    assert (seen.instruction, seen.reset) == ("fold the towel", False)
    # openpi's DROID client sends the gripper as a bare number, too
    assert reader.read({**sent, "observation/gripper_position": 0.5}).proprio is not None


def test_aloha_has_nested_images_with_channels_first() -> None:
    reader = reader_of(fake(("cam_high", "cam_left_wrist", "cam_right_wrist"), 14), "aloha")
    names = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    images = {name: image(number, 3, 6, 8) for number, name in enumerate(names)}
    seen = reader.read(unpack(pack({"state": np.ones(14), "images": images, "prompt": "x"})))
    assert np.array_equal(seen.images["cam_left_wrist"], images["cam_left_wrist"].transpose(1, 2, 0))
    assert seen.images["cam_high"].flags.c_contiguous
    assert seen.images["cam_high"].flags.writeable
    assert list(seen.images) == ["cam_high", "cam_left_wrist", "cam_right_wrist"]
    with pytest.raises(ObservationError, match=r"\(3, height, width\).*shape \(6, 8, 3\)"):
        reader.read({"state": np.ones(14), "images": {**images, "cam_high": image(0)}, "prompt": "x"})


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_and_channels_first_are_read_as_openpi_reads_them(kind: type) -> None:
    reader = reader_of(fake(("base_0_rgb",), None), "droid")
    colours = np.random.default_rng(3).uniform(0, 1, (3, 6, 8)).astype(kind)
    read = reader.read({"observation/exterior_image_1_left": colours, "prompt": "x"}).images["base_0_rgb"]
    assert np.array_equal(read, (255 * colours).astype(np.uint8).transpose(1, 2, 0))
    assert read.flags.c_contiguous
    assert read.flags.writeable
    upright = image(1)
    turned = {"observation/exterior_image_1_left": upright.transpose(2, 0, 1), "prompt": "x"}
    assert np.array_equal(reader.read(turned).images["base_0_rgb"], upright)


def test_cameras_that_a_robot_lacks_are_absent_where_the_policy_takes_that() -> None:
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    lenient = SimpleNamespace(**vars(fake(cameras, 14)), takes_absent_cameras=True)
    sent = {"state": np.ones(14), "images": {"cam_high": image(0, 3, 6, 8)}, "prompt": "x"}
    reader = reader_of(lenient, "aloha")
    assert list(reader.read(sent).images) == ["base_0_rgb"]
    both = {**sent["images"], "cam_right_wrist": image(1, 3, 6, 8), "cam_low": image(2, 3, 6, 8)}
    assert list(reader.read({**sent, "images": both}).images) == ["base_0_rgb", "right_wrist_0_rgb"]
    with pytest.raises(ObservationError, match="has no 'images/cam_high'"):
        reader.read({**sent, "images": {"cam_left_wrist": image(1, 3, 6, 8)}})
    with pytest.raises(ObservationError, match="'images/cam_left' is none of the layout's images"):
        reader.read({**sent, "images": {**sent["images"], "cam_left": image(1, 3, 6, 8)}})
    with pytest.raises(ObservationError, match="'images/wrist' is none of the layout's images"):
        reader.read({**sent, "images/wrist": image(1, 3, 6, 8)})
    for misplaced in ({"image": {"cam_left_wrist": image(1, 3, 6, 8)}}, {"cam_left_wrist": image(1, 3, 6, 8)}):
        with pytest.raises(ObservationError, match="cam_left_wrist' is none of the layout's images"):
            reader.read({**sent, **misplaced})
    with pytest.raises(ObservationError, match="has no 'images/cam_left_wrist'"):
        reader_of(fake(cameras, 14), "aloha").read(sent)
    # DROID's and LIBERO's robots have one hand.
    assert list(reader_of(lenient, "droid").keys) == ["base_0_rgb", "left_wrist_0_rgb"]
    with pytest.raises(ServingError, match="'right_wrist_0_rgb'"):
        reader_of(fake(cameras, 8), "droid")


@pytest.mark.parametrize(("layout", "width"), [("droid", 8), ("aloha", 14), ("cameras", 32)])
def test_actions_are_as_wide_as_the_layouts_robot(layout: str, width: int) -> None:
    policy, chunk = fake(("cam_high",) if layout == "aloha" else ("image",), None), np.ones((10, 32))
    assert reader_of(policy, layout).actions(chunk).shape == (10, width)
    assert reader_of(policy, layout, action_dim=20).actions(chunk).shape == (10, 20)
    assert reader_of(policy, layout, action_horizon=4).actions(chunk).shape == (4, width)
    assert reader_of(policy, layout).actions(chunk[:, :6]).shape == (10, 6)


def test_libero_is_seen_as_the_policys_family_was_evaluated() -> None:
    from vla_pruner.models.openvla.actions import libero_gripper
    from vla_pruner.preprocessing.libero import libero_image, rotate_180

    policy = random_openvla("tiny")
    reader = reader_of(policy, "libero")
    sent = {"observation/image": image(1, 24, 24, 3), "observation/wrist_image": image(2), "prompt": "x"}
    seen = reader.read({**sent, "observation/state": np.zeros(8)})
    assert list(seen.images) == ["image"]
    assert seen.proprio is None  # OpenVLA reads none
    assert np.array_equal(reader.image(seen.images["image"]), libero_image(rotate_180(image(1, 24, 24, 3))))
    chunk = np.random.default_rng(0).uniform(-1, 1, (3, 7))
    assert np.array_equal(reader.actions(chunk), libero_gripper(chunk))
    assert set(reader.actions(chunk)[:, -1]) <= {-1.0, 0.0, 1.0}
    with pytest.raises(VLAPrunerError, match="sees LIBERO is not known"):
        reader_of(fake(("image", "wrist_image"), 8), "libero")


def test_by_the_policys_own_cameras_and_by_keys_that_are_given() -> None:
    policy = fake(("front", "side"), None)
    assert list(reader_of(policy).keys.values()) == ["observation/front", "observation/side"]
    assert reader_of(policy, "cameras", {"side": "cam"}).keys == {"front": "observation/front", "side": "cam"}
    with pytest.raises(ServingError, match=r"'front' is.*--camera-key front=KEY"):
        reader_of(policy, "aloha")
    with pytest.raises(ServingError, match="'back'"):
        reader_of(policy, "cameras", {"back": "x"})
    with pytest.raises(ServingError, match="one of cameras, libero, droid, aloha"):
        reader_of(policy, "bridge")


GOOD: dict[str, Any] = {"observation/image": image(0), "observation/state": np.zeros(4), "prompt": "go"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation/image": None}, "of floats from 0 to 1; found NoneType"),
        ({"observation/image": image(0).astype(np.float32)}, "are colours from 0 to 1; found others"),
        ({"observation/image": np.full((6, 8, 3), np.nan)}, "found others, or NaN"),
        ({"observation/image": image(0).astype(np.int64)}, r"found shape \(6, 8, 3\) of int64"),
        ({"observation/image": image(0, 6, 8)}, r"shape \(6, 8\)"),
        ({"observation/image": image(0, 6, 8, 4)}, r"shape \(6, 8, 4\)"),
        ({"observation/image": image(0, 0, 8, 3)}, "sides of 1 to"),
        ({"observation/image": image(0, 1, 5000, 3)}, "sides of 1 to"),
        ({"observation/image": [[1, 2], [3, 4]]}, "found list"),
        ({"observation/state": "home"}, "list of up to"),
        ({"observation/state": np.zeros((2, 2))}, "list of up to"),
        ({"observation/state": [1, [2]]}, "list of up to"),
        ({"observation/state": np.zeros(5000)}, "list of up to"),
        ({"observation/state": np.zeros(4, bool)}, "list of up to"),
        ({"observation/state": np.array([0, 1, 2, np.nan])}, "finite"),
        ({"observation/state": np.array([0, 1, 2, 1e300])}, "finite"),
        ({"observation/state": [True, False]}, "list of up to"),
        ({"observation/state": ["1", "2"]}, "list of up to"),
        ({"observation/state": True}, "list of up to"),
        ({"observation/state": np.array(["1", "2"])}, "list of up to"),
        ({"observation/state": Unread("an array of type <U2")}, "numbers; found an array of type <U2"),
        ({"observation/image": Unread("an array of type <U2")}, "0 to 1; found an array of type <U2"),
        ({"prompt": 5}, "'prompt' is text"),
        ({"prompt": Unread("an array of type <U2")}, "'prompt' is text .* found an array of type <U2"),
        ({"prompt": "x" * 3000}, "3000 characters"),
        ({"reset": "yes"}, "'reset' is true or false"),
        ({"reset": 2}, "'reset' is true or false"),
        ({"reset": np.zeros(3)}, "'reset' is true or false"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    reader = reader_of(fake(("image",), 4))
    with pytest.raises(ObservationError, match=message):
        reader.read({**GOOD, **change})


@pytest.mark.parametrize(
    "value",
    [
        ["a" * 60_000] + [""] * 1_000,
        [["a" * 10_000] + [""] * 8_000] + [[""] * 8_000] * 11,
        [{"a": "b" * 60_000}] * 1_000,
        ["\x01" * 1_900] * 8_000,
    ],
    ids=["texts", "lists of texts", "maps", "many texts"],
)
@pytest.mark.parametrize("key", [*("observation/image", "observation/state", "prompt"), "reset"])
def test_what_is_no_number_never_reaches_numpy(key: str, value: list[Any]) -> None:
    """From one long text and many short ones NumPy would make an array whose items are all as long as the longest: here
    230 MiB from 60 kB.
    """
    reader = reader_of(fake(("image",), 4))
    tracemalloc.start()
    try:
        with pytest.raises(ObservationError) as error:
            reader.read({**GOOD, key: value})
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 300


def test_the_longest_list_of_numbers_is_read() -> None:
    reader = reader_of(fake(("image",), 4))
    seen = reader.read({**GOOD, "observation/state": [1, np.float32(2), 3.5, np.int64(4), *[0] * (LONGEST_STATE - 4)]})
    assert seen.proprio is not None
    assert seen.proprio[:5].tolist() == [1, 2, 3.5, 4, 0]
    with pytest.raises(ObservationError, match="list of up to"):
        reader.read({**GOOD, "observation/state": [0] * (LONGEST_STATE + 1)})
    with pytest.raises(ObservationError, match="finite"):
        reader.read({**GOOD, "observation/state": [2**64 - 1, -(2**63), float("nan")]})


def test_missing_keys_are_named_with_what_there_is() -> None:
    reader = reader_of(fake(("image",), 4))
    for key in GOOD:
        with pytest.raises(ObservationError, match=f"no '{key}'; this server reads .*Found") as error:
            reader.read({name: value for name, value in GOOD.items() if name != key})
        assert len(str(error.value)) < 400
    with pytest.raises(ObservationError, match=r"Found no key\.$"):
        reader.read({})
    strange = {f"{number:02d}" + "\U000e0001" * 250: 1 for number in range(20)}
    with pytest.raises(ObservationError, match="no 'prompt'") as error:
        reader.read(strange)
    assert len(str(error.value)) < 2500
    with pytest.raises(ObservationError, match="map of keys to values; found list"):
        reader.read([1])


@pytest.mark.parametrize("value", [True, 1, np.bool_(True), np.float32(1), 1.0])
def test_reset(value: Any) -> None:
    reader = reader_of(fake(("image",), 4))
    assert reader.read({**GOOD, "reset": value}).reset
    assert not reader.read({**GOOD, "reset": False}).reset
    assert not reader.read(GOOD).reset


def test_ten_thousand_strange_observations() -> None:
    """They are read or refused, and nothing else comes of them."""
    random = np.random.default_rng(7)
    values: list[Any] = [
        None, True, -1, 2**63, 1.5, float("nan"), "", "go", "é" * 900, [], [1, "a"], [[1], [2]], {}, {"a": {"b": 1}},
        b"raw", np.zeros(0), np.float16(1), np.zeros((1, 1, 1, 1), np.uint8), np.full(4, np.inf), np.zeros(4, np.int64),
        np.zeros((3, 3, 3), np.uint8), np.zeros((3, 3, 3), np.int8), np.uint64(2**64 - 1), np.full(4, 1e39),
    ]  # fmt: skip
    readers = [reader_of(fake(("image",), 4)), reader_of(fake(("cam_high",), 14), "aloha")]
    keys = [*GOOD, "reset", "images", "images/cam_high", "state", "x"]
    read = 0
    for _ in range(10_000):
        message: dict[str, Any] = dict(GOOD)
        for _ in range(random.integers(0, 4)):
            message[keys[random.integers(len(keys))]] = values[random.integers(len(values))]
        try:
            seen = readers[random.integers(2)].read(message)
        except ObservationError:
            continue
        read += 1
        assert seen.proprio is not None
        assert np.isfinite(seen.proprio).all()
        assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in seen.images.values())
    assert read > 1000
