"""Tests that must pass on a GPU, with tiny policies; the same code runs on the CPU, so that it stays correct.

`python -m benchmarks.gpu` runs those that are marked `gpu`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.utils import counters

import vla_pruner as vp
from tests.families.matrix import PRESET
from tests.gpu.policies import MODELS, memory_in_use, subject, waits_for_nothing
from vla_pruner.auditing.reference import FullLength
from vla_pruner.methods.selection import distances, max_min_order, max_min_order_in_tensors

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]
# Importing the compiler raises a warning, and torch reads .grad of every tensor that it traces.
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
FATES = ("drop", "freeze")


def steps_of(device: str, on_gpu: int, on_cpu: int) -> int:
    """Return the number of control steps of a test."""
    return on_gpu if device == "cuda" else on_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_keep_all_changes_no_bit(name: str, dtype: torch.dtype, device: str) -> None:
    one = subject(name, device, dtype)
    untouched = [one.result(scene) for scene in range(4)]
    assert not torch.equal(untouched[0], untouched[1]), "scenes must show, or this test could not fail"
    for fate in FATES:
        with one.attach(vp.VLAPruner(keep=1.0, layer=1, window=1, pruned=fate, preset=PRESET[fate])) as session:
            for scene in range(4):
                assert torch.equal(one.result(scene), untouched[scene]), (fate, scene)
                assert session.kept is None
    assert torch.equal(one.result(0), untouched[0])


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_pruned_agrees_with_the_full_length(name: str, fate: str, device: str) -> None:
    one = subject(name, device)
    untouched = one.result(2)
    with one.attach(vp.VLAPruner(keep=0.25, layer=1, window=1, pruned=fate, preset=PRESET[fate])) as session:
        one.result(0)
        one.result(1)
        actual = one.result(2)
        kept, step = session.kept, session.step
    assert kept is not None
    assert step is not None
    with FullLength(one.policy, step.layout, kept, layer=1, pruned=fate, **one.options):
        expected = one.result(2)
    size = expected.abs().max()
    assert (actual - expected).abs().max() < 1e-3 * size
    assert (actual - untouched).abs().max() > 1e-2 * size, "pruning must show, or this test could not fail"


@pytest.mark.parametrize(("rows", "tokens", "k"), [(1, 256, 64), (8, 256, 64), (1, 512, 64), (2, 729, 182)])
def test_the_greedy_filter_picks_what_its_plain_form_picks(rows: int, tokens: int, k: int, device: str) -> None:
    draw = torch.Generator().manual_seed(tokens)
    features = torch.randn(rows, tokens, 64, generator=draw)
    candidates = torch.zeros(rows, tokens, dtype=torch.bool)
    candidates.scatter_(1, torch.rand(rows, tokens, generator=draw).argsort(dim=1)[:, : 2 * k], True)
    distance, candidates = distances(features).to(device), candidates.to(device)
    max_min_order(distance, candidates, k)  # Triton compiles its kernels at their first call
    with waits_for_nothing(distance.device):
        order = max_min_order(distance, candidates, k)
    assert torch.equal(order, max_min_order_in_tensors(distance, candidates, k))
    assert torch.equal(order.cpu(), max_min_order_in_tensors(distance.cpu(), candidates.cpu(), k))


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_that_pruning_does_waits_for_the_device(name: str, fate: str, device: str) -> None:
    one = subject(name, device)
    entered: list[str] = []

    @contextmanager
    def clock(stage: str) -> Iterator[None]:
        entered.append(stage)
        with waits_for_nothing(one.device):
            yield

    one.steps[0]()
    with one.attach(vp.VLAPruner(keep=0.25, layer=1, window=1, pruned=fate, preset=PRESET[fate])) as session:
        # First without the clock, since Triton compiles its kernels at their first call.
        for scene in range(3):
            one.steps[scene]()
        session.reset()
        session.clock = clock
        for scene in range(4):
            one.steps[scene]()
        assert session.kept is not None
    assert entered, "the clock must be entered, or this test could not fail"


def test_a_session_adds_no_wait_to_those_of_the_policy(device: str) -> None:
    if device == "cpu":
        pytest.skip("torch counts waits for CUDA devices alone")
    for name in MODELS:
        one = subject(name, device)
        one.steps[0]()
        alone = waits(one.steps[1])
        with one.attach(vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper")) as session:
            for step in one.steps:
                step()
            assert waits(one.steps[1]) <= alone, name
            assert session.kept is not None


def waits(step) -> int:
    """Return how often the host waits for the device in a control step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in found)


def check_memory_is_flat(one, count: int) -> None:
    """Run so many control steps of four scenes in turn; the device holds as much memory after them as before."""
    before = memory_in_use(one.device)
    for index in range(count):
        one.steps[index % 4]()
    assert memory_in_use(one.device) == before


@pytest.mark.parametrize("name", ["llama", "oft"])
def test_memory_is_flat(name: str, device: str) -> None:
    one = subject(name, device)
    with one.attach(vp.VLAPruner(keep=0.25, layer=1, window=2, preset="paper")) as session:
        for scene in range(4):
            one.steps[scene]()
        check_memory_is_flat(one, steps_of(device, 200, 8))
        assert session.kept is not None


@pytest.mark.parametrize("name", ["pi0", "reference", "reference-chunk"])
def test_reused_patches_wait_for_nothing_and_memory_is_flat(name: str, device: str) -> None:
    one = subject(name, device)
    one.steps[0]()
    alone = 0 if device == "cpu" else waits(one.steps[1])
    expected = [one.result(scene) for scene in range(4)]
    method, reuse = (
        vp.VLAPruner(keep=1.0, layer=1, window=1, preset="paper"),
        vp.EncoderReuse(keep=0.25, refresh_every=None),
    )
    with one.attach(method, encoder=reuse) as session:
        for scene in (0, 0, 0):
            assert torch.allclose(one.result(scene), expected[scene], rtol=1e-4, atol=1e-4)
        assert None not in session.encoded
        for scene in range(4):
            one.steps[scene]()
        check_memory_is_flat(one, steps_of(device, 50, 8))
        assert device == "cpu" or waits(one.steps[1]) <= alone
        assert None not in session.encoded


@pytest.mark.parametrize("name", ["llama", "pi0", "oft"])
def test_graphs_do_what_eager_steps_do_for_two_episodes(name: str, device: str) -> None:
    if device == "cpu" and name != "llama":
        pytest.skip("tests/families/test_compiled.py has this family on the CPU")
    one = subject(name, device)
    method = vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper")
    with one.attach(method) as session:
        expected = episodes(one, session)
    with one.attach(method) as session:
        session.compile("inductor" if device == "cuda" else "eager")
        counters.clear()
        first = episode(one, session)
        made = counters["stats"]["unique_graphs"]
        second = episode(one, session)
        assert counters["stats"]["unique_graphs"] == made, "the second episode makes no graph"
        assert made
        assert not counters["inductor"]["cudagraph_skips"], dict(counters["inductor"])
        if device == "cuda":
            assert memory_of_steps(one, 200) == 0
    for actual, wanted in zip([*first, *second], expected, strict=True):
        torch.testing.assert_close(actual[0], wanted[0], rtol=1e-3, atol=1e-3)
        assert (actual[1] is None) == (wanted[1] is None)
        if actual[1] is not None and wanted[1] is not None:
            assert torch.equal(actual[1], wanted[1])
    assert first[-1][1] is not None, "it must prune, or this test could not fail"


def memory_of_steps(one, count: int) -> int:
    """Return the bytes that `count` control steps leave allocated."""
    before = memory_in_use(one.device)
    for index in range(count):
        one.steps[index % 4]()
    return memory_in_use(one.device) - before


def episodes(one, session: vp.Session):
    """Run two episodes; the results are as of `episode`."""
    return [*episode(one, session), *episode(one, session)]


def episode(one, session: vp.Session):
    """Run an episode of four control steps; return the actions and the kept tokens of each."""
    session.reset()
    found = []
    for step in one.steps:
        actions = torch.as_tensor(step()).float().cpu().clone()
        kept = session.kept
        found.append((actions, None if kept is None else kept.cpu()))
    return found
