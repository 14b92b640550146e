"""The choice of the patches that a vision encoder encodes, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vla_pruner as vp


def test_changed_patches_come_first():
    change = torch.tensor([[0.0, 4.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1e-9]])
    assert vp.EncoderReuse().select(change, None, 2).tolist() == [[1, 3], [0, 3]]


def test_attention_raises_the_rank_as_a_share_of_its_own_image():
    change = torch.tensor([[1.0, 0.4, 0.0, 0.0]])
    attention = torch.tensor([[0.0, 0.0, 0.003, 0.001]])
    # Shares are 1, .4, 0, 0 and 0, 0, 1, 1/3: with weight .5 the third patch passes the second.
    assert vp.EncoderReuse(attended=0.5).select(change, attention, 2).tolist() == [[0, 2]]
    assert vp.EncoderReuse(attended=0.3).select(change, attention, 2).tolist() == [[0, 1]]
    assert vp.EncoderReuse(attended=0).select(change, attention, 3).tolist() == [[0, 1, 2]]
    assert vp.EncoderReuse(attended=9).select(change, attention, 2).tolist() == [[2, 3]]


def test_ties_go_to_the_smaller_id():
    assert vp.EncoderReuse().select(torch.zeros(1, 5), torch.zeros(1, 5), 3).tolist() == [[0, 1, 2]]


def test_pixels_that_are_no_number_are_encoded():
    change = torch.tensor([[0.5, 1.0, torch.nan, 2.0]])
    assert vp.EncoderReuse().select(change, None, 1).tolist() == [[2]]


def test_budget():
    assert vp.EncoderReuse(keep=0.25).budget(256) == 64
    assert vp.EncoderReuse(keep=0.001).budget(64) == 1
    assert vp.EncoderReuse(keep=np.int64(7)).budget(64) == 7
    assert vp.EncoderReuse(keep=1.0).budget(64) == 64
    with pytest.raises(vp.BudgetError, match="65 patches was given, but an image of this vision encoder has 64"):
        vp.EncoderReuse(keep=65).budget(64)


@pytest.mark.parametrize(
    ("every", "whole"), [(1, [True] * 5), (3, [True, False, False, True, True]), (None, [True] + [False] * 4)]
)
def test_refresh(every, whole):
    assert [vp.EncoderReuse(refresh_every=every).encodes_all(steps) for steps in range(5)] == whole


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, True, "half", {"front": 0.5}, float("nan")])
def test_keep_out_of_range(keep):
    with pytest.raises(vp.BudgetError, match="fraction of the patches"):
        vp.EncoderReuse(keep=keep)


@pytest.mark.parametrize(
    "options", [{"refresh_every": 0}, {"refresh_every": 2.0}, {"attended": -1}, {"attended": float("inf")}]
)
def test_options_out_of_range(options):
    with pytest.raises(vp.OptionError, match=f"{next(iter(options))}="):
        vp.EncoderReuse(**options)
