"""Bins, statistics and gripper, by hand and against the official outputs."""

import json

import numpy as np
import pytest
import torch

from vla_pruner.errors import CheckpointError, ObservationError, OptionError
from vla_pruner.models.openvla import actions

STATS = {"q01": [-2.0, 0.0], "q99": [2.0, 1.0], "min": [-4.0, 0.0], "max": [0.0, 8.0], "mask": [True, False]}


def official(folder, part):
    return json.loads((folder / "dataset_statistics.json").read_text()).popitem()[1][part]


def test_openvla_tokens_become_the_official_actions(golden):
    expected = np.load(golden / "openvla_tiny" / "golden.npz")
    ids = torch.from_numpy(expected["action_token_ids"])
    np.testing.assert_array_equal(actions.bin_index(ids), expected["bin_index"])
    np.testing.assert_array_equal(actions.decode_bins(ids), expected["normalized_actions"])
    found = actions.unnormalize(actions.decode_bins(ids), official(golden / "openvla_tiny", "action"))
    np.testing.assert_array_equal(found, expected["actions"])


def test_oft_actions_and_states_are_the_official_ones(golden):
    folder = golden / "openvla_oft_tiny"
    expected = np.load(folder / "golden.npz")
    stats = official(folder, "action")
    found = actions.unnormalize(torch.from_numpy(expected["normalized_actions"]), stats, actions.OFT_EPSILON)
    np.testing.assert_allclose(found, expected["actions"], rtol=0, atol=1e-7)
    found = actions.normalize_proprio(expected["state"], official(folder, "proprio"))
    np.testing.assert_array_equal(found, expected["proprio_normalized"])
    assert (np.abs(found) == 1.0).any()  # clipping is exercised


def test_the_first_and_the_last_two_bins():
    ids = [31999, 31998, 31745, 31744, 100, 32050]
    assert actions.bin_index(ids).tolist() == [0, 1, 254, 254, 254, 0]
    values = actions.decode_bins(ids)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values[:4], [-1 + 1 / 255, -1 + 3 / 255, 1 - 1 / 255, 1 - 1 / 255], atol=1e-12)
    assert actions.bin_index([[9], [8]], vocab_size=10, n_bins=4).tolist() == [[0], [1]]


def test_bins_want_integers():
    with pytest.raises(ObservationError, match="integer ids; found an array of float64"):
        actions.bin_index([31999.0])


@pytest.mark.parametrize(("bounds", "expected"), [("q99", [2.0, 1.0]), ("minmax", [0.0, 1.0])])
def test_bounds_choose_the_statistics_and_masked_dimensions_stay(bounds, expected):
    assert actions.unnormalize([1.0, 1.0], STATS, bounds=bounds).tolist() == expected


def test_an_absent_mask_is_all_true():
    stats = {"q01": [0.0], "q99": [10.0]}
    assert actions.unnormalize([[0.0], [1.0]], stats).tolist() == [[5.0], [10.0]]
    assert actions.unnormalize([1.0], stats, epsilon=1.0).tolist() == [11.0]
    np.testing.assert_allclose(
        actions.normalize_proprio([[5.0], [99.0], [-1.0]], stats), [[0.0], [1.0], [-1.0]], atol=1e-8
    )


def test_a_state_in_minmax_bounds_is_clipped_where_masked_too():
    found = actions.normalize_proprio([-2.0, 7.0], STATS, bounds="minmax")
    np.testing.assert_allclose(found, [0.0, 1.0], atol=1e-8)


def test_tensors_of_any_type_are_read():
    values = torch.tensor([0.5, 0.5], dtype=torch.bfloat16, requires_grad=True)
    assert actions.unnormalize(values, STATS).tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("values", "stats", "options", "error", "message"),
    [
        ([1.0] * 3, STATS, {}, ObservationError, r"an action of 2 dimensions; found an array of shape \(3,\)"),
        (1.0, STATS, {}, ObservationError, "found the single number 1.0"),
        (["a", "b"], STATS, {}, ObservationError, "An array of numbers is needed; found list"),
        ([1.0, 1.0], {"action": STATS}, {}, CheckpointError, "lack q01 and q99; found action"),
        ([1.0, 1.0], {}, {"bounds": "minmax"}, CheckpointError, "lack min and max; found nothing"),
        ([1.0] * 2, {**STATS, "mask": [True]}, {}, CheckpointError, r"do not agree: q01 has shape \(2,\), q99 \(2,\)"),
        ([1.0] * 2, {**STATS, "q99": "high"}, {}, CheckpointError, "an action are not lists of numbers"),
        ([1.0] * 2, {**STATS, "q99": [-3.0, 1.0]}, {}, CheckpointError, r"q01 -2.0 and q99 -3.0 in dimension 0; they"),
        ([1.0] * 2, {**STATS, "q01": [np.nan, 0.0]}, {}, CheckpointError, "q01 nan and q99 2.0 in dimension 0; they"),
        (
            [1.0, 1.0],
            STATS,
            {"bounds": "std"},
            OptionError,
            "bounds='std' is not supported; give one of 'q99', 'minmax'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(values, stats, options, error, message):
    with pytest.raises(error, match=message):
        actions.unnormalize(values, stats, **options)
    with pytest.raises(error, match=message.replace("an action", "a state")):
        actions.normalize_proprio(values, stats, **options)


def test_only_limits_that_are_used_must_be_right():
    stats = {**STATS, "q01": [-2.0, np.nan]}  # masked out
    assert actions.unnormalize([0.0, 0.5], stats).tolist() == [0.0, 0.5]


def test_a_constant_dimension_is_its_constant():
    # Published statistics have such: rotations that a robot never makes, for instance.
    stats = {"q01": [0.25, 0.0], "q99": [0.25, 1.0]}
    assert actions.unnormalize([[0.9, -1.0], [-0.9, 1.0]], stats).tolist() == [[0.25, 0.0], [0.25, 1.0]]
    found = actions.unnormalize([1.0, 1.0], stats, epsilon=actions.OFT_EPSILON)
    np.testing.assert_allclose(found, [0.25, 1.0], rtol=0, atol=2e-8)
    np.testing.assert_allclose(actions.normalize_proprio([0.25, 0.5], stats), [-1.0, 0.0], atol=1e-7)


def test_liberos_gripper_closes_where_the_policy_says_zero():
    before = np.array([[0.3, 0.9], [0.3, 0.1], [0.3, 0.5], [0.3, 0.996]])
    after = actions.libero_gripper(before)
    assert after.tolist() == [[0.3, -1.0], [0.3, 1.0], [0.3, 0.0], [0.3, -1.0]]
    assert before[0, 1] == 0.9
