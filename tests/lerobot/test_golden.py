"""The official tiny LeRobot policies, unpruned and for a given kept set, against stored arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.lerobot.tiny import KINDS, K, batch_of, chunk, load_tiny

each_kind = pytest.mark.parametrize("kind", KINDS)


def watch(module):
    """Return the outputs of the prefix and of each denoising step of a policy, as they come."""
    seen = {"prefix": [], "velocity": []}
    inner = module.model
    both = getattr(inner, "vlm_with_expert", None) or inner.paligemma_with_expert
    forward, denoise = both.forward, inner.denoise_step

    def run(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if kwargs["inputs_embeds"][1] is None:
            seen["prefix"].append(outputs[0][0])
        return outputs

    def step(*args, **kwargs):
        seen["velocity"].append(denoise(*args, **kwargs))
        return seen["velocity"][-1]

    both.forward, inner.denoise_step = run, step
    return seen


def check(actual, expected):
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-4)


@each_kind
def test_unpruned(golden, kind):
    module = load_tiny(golden, kind).module
    arrays = np.load(golden / f"lerobot_{kind}_tiny" / "golden.npz")
    seen = watch(module)
    check(chunk(module, arrays), arrays["actions"])
    check(torch.stack(seen["velocity"]), arrays["v_t"])
    real = arrays["prefix_pad_masks"]
    check(seen["prefix"][0][torch.tensor(real)], arrays["prefix_last_hidden"][real])


@each_kind
def test_pruned(golden, kind):
    module = load_tiny(golden, kind).module
    arrays = np.load(golden / f"lerobot_{kind}_tiny" / "golden.npz")
    pruned = np.load(golden / f"lerobot_{kind}_tiny" / "pruned.npz")
    assert int(pruned["K"]) == K
    kept = pruned["kept_prefix"]
    with vp.KeepFixed(tuple(pruned["kept_visual"]), layer=K).attach(module) as session:
        seen = watch(module)
        actions = chunk(module, arrays)
        assert session.kept is not None
        assert session.kept.tolist() == [pruned["kept_visual"].tolist()] * 2
    check(actions, pruned["actions"])
    check(torch.stack(seen["velocity"]), pruned["v_t"])
    real = arrays["prefix_pad_masks"][:, kept]
    check(seen["prefix"][0][:, kept][torch.tensor(real)], pruned["prefix_last_hidden_kept"][real])
    assert (pruned["actions"] - arrays["actions"]).max() > 1e-2, "pruning must show, or this test could not fail"


@each_kind
def test_layout_is_where_the_official_prefix_has_it(golden, kind):
    module = load_tiny(golden, kind).module
    arrays = np.load(golden / f"lerobot_{kind}_tiny" / "golden.npz")
    with vp.Unpruned().attach(module) as session:
        module.predict_action_chunk(batch_of(arrays))
        assert session.step is not None
        layout = session.step.layout
    each = int(arrays["tokens_per_image"])
    assert layout.cameras == (each, each)
    assert layout.visual.tolist() == [list(range(int(arrays["n_visual"])))] * 2
    assert layout.prompt.tolist() == arrays["prefix_pad_masks"].tolist()
    assert layout.valid.all()
    assert not layout.absent
