"""The Triton form of the greedy filter picks the same tokens as the others, bit for bit.

Without a GPU it runs in Triton's interpreter, which must be chosen before Triton is imported: `make test-triton`.
"""

from __future__ import annotations

import os

import pytest
import torch

from vla_pruner.methods.selection import (
    LARGEST_FUSED,
    distances,
    fused_form,
    max_min_order,
    max_min_order_in_arrays,
    max_min_order_in_tensors,
)

pytest.importorskip("triton", reason="Triton is not installed (torch for the CPU comes without): make test-triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vla_pruner.methods.greedy_triton import greedy_kernel, max_min_order_in_triton, nearest_kernel, shape_of

# Triton 3.6's interpreter reads a number out of an array in a way that NumPy will give up.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SIZES = [
    (1, 1, 1, 1),
    (1, 2, 2, 2),
    (3, 40, 12, 5),
    (3, 40, 12, 12),
    (2, 33, 33, 33),
    (2, 65, 64, 30),
    (1, 256, 120, 64),
]
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no CUDA device, and TRITON_INTERPRET=1 is not set: make test-triton",
)
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")


def problem(rows, tokens, count, levels, device=DEVICE):
    """Distances with many ties (of `levels` values) or without (None), and `count` candidates or a few more."""
    generator = torch.Generator().manual_seed(tokens + count)
    if levels is None:
        distance = distances(torch.randn(rows, tokens, 8, generator=generator))
    else:
        distance = torch.randint(levels, (rows, tokens, tokens), generator=generator).float()
    candidates = torch.zeros(rows, tokens, dtype=torch.bool)
    for row in range(rows):
        candidates[row, torch.randperm(tokens, generator=generator)[: count + row]] = True
    return distance.to(device), candidates.to(device)


@runs
@pytest.mark.parametrize("levels", [None, 1, 2, 3])
@pytest.mark.parametrize(("rows", "tokens", "count", "k"), SIZES)
def test_it_picks_what_arrays_and_tensors_pick(rows, tokens, count, k, levels):
    distance, candidates = problem(rows, tokens, count, levels)
    order = max_min_order_in_triton(distance, candidates, k)
    assert order.dtype == torch.int64
    assert torch.equal(order, max_min_order_in_tensors(distance, candidates, k))
    assert torch.equal(order.cpu(), max_min_order_in_arrays(distance.cpu(), candidates.cpu(), k))


@runs
def test_tensors_may_lie_in_memory_as_they_like():
    distance, candidates = problem(2, 40, 20, None)
    wide = torch.cat([candidates, candidates], dim=1)
    turned = distance.transpose(1, 2)
    expected = max_min_order_in_tensors(turned.contiguous(), candidates, 9)
    assert torch.equal(max_min_order_in_triton(turned, wide[:, :40], 9), expected)


@runs
def test_numbers_that_are_none_count_as_zero():
    distance, candidates = problem(2, 40, 30, None)
    distance[0, 3:20, 5:30] = torch.nan
    distance[1] = torch.nan
    order = max_min_order_in_triton(distance, candidates, 20)
    assert torch.equal(order, max_min_order_in_tensors(distance.nan_to_num(0.0), candidates, 20))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize(("tokens", "k"), [(511, 128), (768, 192), (2048, 512), (2049, 64), (LARGEST_FUSED, 64)])
def test_many_tokens_on_a_gpu(tokens, k, levels):
    distance, candidates = problem(2, tokens, min(tokens, 2 * k), levels)
    order = max_min_order_in_triton(distance, candidates, k)
    assert torch.equal(order, max_min_order_in_tensors(distance, candidates, k))


@pytest.mark.gpu
@on_gpu
def test_it_is_what_runs_on_a_gpu_and_never_waits():
    distance, candidates = problem(2, 256, 120, None, "cuda")
    fused = fused_form(distance.device)
    assert fused is max_min_order_in_triton
    expected = max_min_order(distance, candidates, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        order = max_min_order(distance, candidates, 64)
        in_tensors = max_min_order_in_tensors(distance, candidates, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(order, expected)
    assert torch.equal(in_tensors, expected)


@pytest.mark.gpu
@on_gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_it_is_part_of_a_cuda_graph():
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, c: max_min_order(distances(x), c, 64).sort(dim=1).values, fullgraph=True, mode="reduce-overhead"
    )
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(2, 256, 64, generator=generator).cuda()
        candidates = (torch.rand(2, 256, generator=generator) < 0.6).cuda()
        kept = compiled(features, candidates)
        assert (kept.diff(dim=1) > 0).all()
        assert candidates.gather(1, kept).all()
        # Distances of another kernel may differ in their last bit; those of one replay do not.
        assert torch.equal(kept.clone(), compiled(features, candidates))
    assert not counters["inductor"]["cudagraph_skips"], dict(counters["inductor"])


@pytest.mark.gpu
@on_gpu
def test_a_captured_graph_picks_anew():
    distance, candidates = problem(1, 256, 120, None, "cuda")
    max_min_order(distance, candidates, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        order = max_min_order(distance, candidates, 64)
    other, others = problem(1, 256, 121, None, "cuda")
    distance.copy_(other)
    candidates.copy_(others)
    graph.replay()
    assert torch.equal(order, max_min_order_in_tensors(other, others, 64))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("tokens", "round_number"), [(256, True), (729, False), (768, True), (LARGEST_FUSED, True)])
def test_it_compiles_for_gpus_that_are_not_here(tokens, round_number, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block, tile, warps = shape_of(tokens)
    pointers = {"distance": "*fp32", "candidates": "*i1", "nearest": "*fp32", "order": "*i64"}
    for kernel, sizes, num_warps in (
        (nearest_kernel, {"tile": tile, "block": block}, 4),
        (greedy_kernel, {"block": block}, warps),
    ):
        place = kernel.arg_names.index
        signature = {name: "constexpr" if name in sizes else pointers.get(name, "i32") for name in kernel.arg_names}
        aligned = [name for name in kernel.arg_names if name in pointers or (name == "tokens" and round_number)]
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(place(name),): value for name, value in sizes.items()},
            attrs={(place(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
        assert compiled.asm["cubin"]
        assert ".local" not in compiled.asm["ptx"], "what should stay in registers does not"
        assert ("ld.global.v4" in compiled.asm["ptx"]) is round_number, "rows are read four numbers at a time"
