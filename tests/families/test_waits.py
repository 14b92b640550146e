"""No control step of a session makes the host wait for the device, whatever the family, the method and the fate."""

from __future__ import annotations

import pytest

import vla_pruner as vp
from tests.families import cases, text_decoders
from tests.families.waits import COMPILED, FATES, METHODS, check_no_wait, possible
from tests.pairwise import pairwise

FAMILIES = {
    str(case): case
    for case in (
        cases.decoder_lm(),
        cases.reference(),
        cases.chunk(),
        cases.openvla("sdpa"),
        cases.openvla_oft("l1"),
        cases.openvla_oft(None),
        cases.openvla_oft("diffusion"),
        cases.pi0("sdpa"),
        *map(text_decoders.text_decoder, ("qwen3_vl_text", "gemma3_text")),
    )
}


# Importing the compiler raises a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.mark.parametrize(
    ("family", "method", "pruned", "compiled"),
    pairwise(list(FAMILIES), list(METHODS), FATES, COMPILED, possible=possible),
)
def test_no_wait(family, method, pruned, compiled):
    check_no_wait(FAMILIES[family], method, pruned, compiled)


@pytest.mark.parametrize("family", ["chunk", "reference", "pi0-sdpa"])
@pytest.mark.parametrize("method", ["VLA-Pruner", "FastV"])
def test_no_wait_with_reused_patches(family, method):
    check_no_wait(FAMILIES[family], method, encoder=vp.EncoderReuse(keep=0.25))


def test_vla_cache_waits_for_one_answer():
    """VLA-Cache waits to know whether enough tokens are static, as documented, and for nothing else."""
    method = "VLA-Cache"
    with pytest.raises(AssertionError, match=r"vla_cache\.py"):
        check_no_wait(FAMILIES["chunk"], method, "reuse")
    check_no_wait(FAMILIES["chunk"], method, "reuse", allowed="methods/vla_cache.py")
