"""Options that come out of NumPy's arrays, as sweeps make them."""

from __future__ import annotations

import numpy as np
import pytest

import vla_pruner as vp

FROM_ARRAYS = [
    (vp.VLAPruner(keep=np.float32(0.1), preset="paper"), vp.VLAPruner(keep=0.1, preset="paper")),
    (
        vp.VLAPruner(keep=np.float64(0.25), window=np.int64(2), layer=np.int32(1), preset="paper"),
        vp.VLAPruner(window=2, layer=1, preset="paper"),
    ),
    (
        vp.VLAPruner(keep=np.int64(64), decay=np.float16(0.5), preset="paper"),
        vp.VLAPruner(keep=64, decay=0.5, preset="paper"),
    ),
    (
        vp.VLAPruner(refresh_every=np.uint8(4), layer=0, preset="paper"),
        vp.VLAPruner(refresh_every=4, layer=0, preset="paper"),
    ),
    (vp.FastV(keep=np.int8(3), warmup_steps=np.int64(3)), vp.FastV(keep=3, warmup_steps=3)),
    (vp.RandomKeep(seed=np.int64(7)), vp.RandomKeep(seed=7)),
    (vp.KeepFixed(np.arange(3)), vp.KeepFixed((0, 1, 2))),
    (vp.ScoreFusion(weight=np.float32(0.3)), vp.ScoreFusion(weight=0.3)),
    (vp.ActionAndDiversity(share=np.float32(0.7)), vp.ActionAndDiversity(share=0.7)),
    (vp.VLACache(threshold=np.float32(0.9), relevance=np.float32(0.1)), vp.VLACache(threshold=0.9, relevance=0.1)),
    (vp.TextQuery(gate=np.int64(3)), vp.TextQuery(gate=3)),
    (
        vp.SparseVLM(then=((np.int64(6), np.float32(0.2)), (np.int64(9), np.int64(5)))),
        vp.SparseVLM(then=((6, 0.2), (9, 5))),
    ),
    (vp.DivPrune(keep={"a": np.int64(3), "b": np.float32(0.3)}), vp.DivPrune(keep={"a": 3, "b": 0.3})),
]


@pytest.mark.parametrize(("given", "meant"), FROM_ARRAYS, ids=lambda one: type(one).__name__)
def test_numbers_of_numpy_are_the_numbers_that_they_are(given, meant):
    assert given == meant
    assert repr(given) == repr(meant)
    if not isinstance(getattr(meant, "keep", None), dict):
        assert hash(given) == hash(meant)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": np.float32("nan")},
        {"keep": np.float32(1.5)},
        {"keep": np.int64(0)},
        {"keep": np.bool_(True)},
        {"keep": np.array([0.5])},
        {"keep": np.str_("0.5")},
        {"layer": np.float32(3)},
        {"layer": np.bool_(True)},
    ],
    ids=str,
)
def test_what_is_refused_of_pythons_numbers_is_refused_of_numpys(options):
    with pytest.raises(vp.OptionError, match="was given"):
        vp.FastV(**options)


@pytest.mark.parametrize("seed", [1.5, "7", True, None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(vp.OptionError, match="seed"):
        vp.RandomKeep(seed=seed)
