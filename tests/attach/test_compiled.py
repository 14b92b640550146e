"""Compiled sessions compute what uncompiled ones do, in programs that the first episode makes once and for all.

The backend "eager" runs what was traced as it is: everything but the compiler's own arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import vla_pruner as vp
from tests.attach.tiny import CACHE, LENGTH, VISUAL, decode, make_cache, prompt, tiny_lm
from tests.families.compiled import Record, assert_same, drive, graphs, record
from tests.state import whole_state
from vla_pruner.attach.parts import Parts

# Importing the compiler warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

DEPTH = 4
METHODS = {
    "drop": (vp.VLAPruner(keep=0.25, window=1, preset="paper"), {}),
    "freeze": (
        vp.VLAPruner(keep=0.25, layer=1, window=1, pruned="freeze"),
        {"backend": "eager", "cache": "static"},
    ),
    "before": (vp.VLAPruner(keep=0.25, layer=0, window=1, refresh_every=2, preset="paper"), {}),
    "before, frozen": (
        vp.VLAPruner(keep=0.25, layer=0, window=1, pruned="freeze", refresh_every=2),
        {"cache": "static"},
    ),
    "fastv": (vp.FastV(keep=0.25, pruned="freeze"), {"kind": "gemma2", "backend": "eager"}),
    "progressive": (vp.SparseVLM(keep=0.75, layer=1, then=((2, 0.5), (3, 0.125))), {"backend": "eager"}),
    "diverse": (vp.MaxMinDiversity(keep=0.25, layer=2, metric="euclidean"), {"cache": "static"}),
    "random": (vp.RandomKeep(keep=0.25, layer=1, warmup_steps=1), {"kind": "qwen3"}),
    "divprune": (vp.DivPrune(keep=0.25, pruned="freeze"), {"cache": "static"}),
    "text": (vp.TextQuery(keep=0.25), {}),
    "gate": (vp.TextQuery(keep=0.25, gate=2), {}),
    "refreshed": (
        vp.VLAPruner(keep=0.25, window=2, warmup="semantic", refresh_every=2, preset="paper"),
        {"kind": "gemma2", "backend": "eager"},
    ),
}


def lm(kind="llama", backend="sdpa") -> Any:
    return tiny_lm(kind, backend, num_hidden_layers=DEPTH)


def stepper(model: Any, cache: str = "dynamic", length: int = LENGTH) -> Callable[..., torch.Tensor]:
    """Return a function that runs one control step on two rows of a scene: (B, 3, V) logits."""
    return lambda scene: decode(model, prompt(2, seed=scene)[0][:, :length], None, make_cache(cache, model), 2)[1]


@pytest.mark.parametrize("name", METHODS)
def test_same_as_uncompiled_and_no_graph_after_the_first_episode(name):
    method, options = METHODS[name]
    cache = options.get("cache", "dynamic")
    model = lm(options.get("kind", "llama"), options.get("backend", "sdpa"))
    step = stepper(model, cache)
    with method.attach(model, visual=VISUAL) as session:
        expected = drive(session, step)
    with method.attach(model, visual=VISUAL) as session:
        session.compile("eager")
        counters.clear()
        actual = drive(session, step, after_first=counters_stay)
    assert_same(actual, expected)
    kept = [one.kept is not None for one in actual]
    assert any(kept[:4]), "the first episode must prune, or this test could not fail"


def counters_stay() -> Callable[[], None]:
    before = graphs()
    assert before

    def check() -> None:
        assert graphs() == before

    return check


def test_a_new_prompt_length_compiles_its_own_programs_and_no_more():
    model = lm()
    method = vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper")
    lengths = (LENGTH, LENGTH - 2, LENGTH, LENGTH - 2)
    with method.attach(model, visual=VISUAL) as session:
        expected = [episode(session, stepper(model, length=n)) for n in lengths]
    with method.attach(model, visual=VISUAL) as session:
        session.compile("eager")
        counters.clear()
        actual, seen = [], []
        for n in lengths:
            actual.append(episode(session, stepper(model, length=n)))
            seen.append(graphs())
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)
    assert seen == [4, 8, 8, 8]


def episode(session: vp.Session, step: Callable[..., torch.Tensor]) -> list[Record]:
    session.reset()
    return [record(session, step(scene)) for scene in range(3)]


@pytest.mark.parametrize("method", [vp.FastV(keep=0.25, layer=1), METHODS["before"][0]], ids=lambda one: one.layer)
def test_a_static_cache_of_another_size_has_programs_of_its_own(method):
    model = lm()

    def step(scene: int) -> torch.Tensor:
        cache = make_cache("static", model) if scene // 2 % 2 else bigger(model)
        return decode(model, prompt(2, seed=scene)[0], None, cache, 1)[1]

    with method.attach(model, visual=VISUAL) as session:
        expected = [record(session, step(scene)) for scene in range(4)]
    assert any(one.kept is not None for one in expected[:2])
    assert any(one.kept is not None for one in expected[2:])
    with method.attach(model, visual=VISUAL) as session:
        session.compile("eager")
        assert_same([record(session, step(scene)) for scene in range(4)], expected)


def bigger(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=2 * LENGTH)


def test_a_static_cache_that_is_reset_needs_no_new_graph():
    model = lm()
    cache = make_cache("static", model)

    def step(scene: int) -> torch.Tensor:
        cache.reset()
        return decode(model, prompt(2, seed=scene)[0], None, cache, 2)[1]

    method = vp.KeepFixed((0, 5, 9), layer=1, pruned="freeze")
    with method.attach(model, visual=VISUAL) as session:
        expected = [record(session, step(scene)) for scene in range(3)]
    cache = make_cache("static", model)
    with method.attach(model, visual=VISUAL) as session:
        session.compile("eager")
        counters.clear()
        actual = [record(session, step(0))]
        check = counters_stay()
        actual += [record(session, step(scene)) for scene in (1, 2)]
        check()
    assert_same(actual, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_keep_all_is_the_compiled_model_to_the_bit(cache):
    model = lm()
    step = stepper(model, cache)
    with vp.compiled(model, "eager", visual=VISUAL) as baseline:
        untouched = [step(scene) for scene in range(3)]
        assert baseline.programs == 2
    with vp.VLAPruner(keep=1.0, layer=1, window=1, preset="paper").attach(model, visual=VISUAL) as session:
        session.compile("eager")
        assert all(torch.equal(step(scene), untouched[scene]) for scene in range(3))


def test_batches_of_other_sizes_and_models_beside_each_other():
    """Each has programs with shapes of its own; nothing becomes a variable because another's differs."""
    one, two = lm(), tiny_lm(seed=5, num_hidden_layers=DEPTH, hidden_size=16)
    method = vp.FastV(keep=0.25, layer=1)
    expected: dict[Any, Any] = {}
    for compiled in (False, True):
        found: dict[Any, Any] = {}
        for model, width in ((one, 32), (two, 16)):
            for rows in (1, 3):
                with method.attach(model, visual=VISUAL) as session:
                    if compiled:
                        session.compile("eager")
                        counters.clear()
                    embeds = prompt(rows)[0][..., :width]
                    found[width, rows] = decode(model, embeds, None, None, 2)[1]
                    assert not compiled or graphs() == 2
        for key, logits in expected.items():
            assert (logits - found[key]).abs().max() < 1e-5
        expected = found


@pytest.mark.parametrize("name", ["drop", "freeze", "before"])
def test_no_trace(name):
    method, options = METHODS[name]
    model = lm(backend=options.get("backend", "sdpa"))
    step = stepper(model)
    untouched, before = step(0), whole_state(model)
    with method.attach(model, visual=VISUAL) as session:
        session.compile("eager")
        with pytest.raises(vp.SessionError, match="compiled already"):
            session.compile("eager")
        with pytest.raises(vp.SessionError, match="session already"):
            vp.FastV(keep=0.5).attach(model, visual=VISUAL)
        with pytest.raises(vp.SessionError, match="has a session"):
            vp.compiled(model, "eager", visual=VISUAL)
        with pytest.raises(vp.SessionError, match="copied or pickled"):
            copy.deepcopy(model)
        step(0)
    assert whole_state(model) == before
    with pytest.raises(vp.SessionError, match="detached"):
        session.compile("eager")
    assert torch.equal(step(0), untouched)


def test_no_trace_of_the_baseline_and_what_it_refuses():
    model = lm()
    untouched, before = stepper(model)(0), whole_state(model)
    made = vp.compiled(model, "eager", visual=VISUAL)
    with pytest.raises(vp.UnsupportedModelError, match="compiled already"):
        vp.compiled(model, "eager", visual=VISUAL)
    with pytest.raises(vp.UnsupportedModelError, match="compiled already"):
        vp.FastV(keep=0.5).attach(model, visual=VISUAL)
    with pytest.raises(vp.SessionError, match="copied or pickled"):
        copy.deepcopy(model)
    assert (stepper(model)(0) - untouched).abs().max() < 1e-4
    made.remove()
    made.remove()
    assert whole_state(model) == before
    model.compile(backend="eager")
    for refused in (vp.FastV(keep=0.5).attach, lambda one, **options: vp.compiled(one, "eager", **options)):
        with pytest.raises(vp.UnsupportedModelError, match="is compiled and holds the decoder"):
            refused(model, visual=VISUAL)


def test_what_fails_inside_of_a_compiled_call_fails_and_disturbs_nothing():
    model = lm()
    before, step = whole_state(model), stepper(model)
    with vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper").attach(model, visual=VISUAL) as session:
        expected = [record(session, step(scene)) for scene in range(3)]
    with (
        vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper").attach(model, visual=VISUAL) as session,
        torch.no_grad(),
    ):
        session.compile("eager")
        actual = [record(session, step(scene)) for scene in range(2)]
        embeds = prompt(2)[0]
        original = model.model.norm.weight
        model.model.norm.weight = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(RuntimeError):
            model(inputs_embeds=embeds)
        model.model.norm.weight = original
        cache = make_cache("dynamic", model)
        model(inputs_embeds=embeds, **{CACHE: cache})
        with pytest.raises(vp.SessionError, match="another cache"):
            model(input_ids=torch.ones(2, 1, dtype=torch.int64), **{CACHE: make_cache("dynamic", model)})
        with pytest.raises(vp.SessionError, match="holds 31 positions"):
            model(inputs_embeds=embeds, **{CACHE: cache})
        session.memory = actual[1].memory
        actual.append(record(session, step(2)))
    assert_same(actual, expected)
    assert whole_state(model) == before


class Doubled(torch.nn.Module):
    """A module whose output is doubled."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(hidden)


def test_a_layer_that_is_exchanged_within_an_episode_is_the_one_that_runs():
    """Guards on the model are dropped, so a program would go on with the parts that it was traced with."""
    found = []
    for compiled in (False, True):
        model = lm()
        step, last = stepper(model), model.model.layers[-1]
        with vp.FastV(keep=0.25, layer=1).attach(model, visual=VISUAL) as session:
            if compiled:
                session.compile("eager")
            records = [record(session, step(0))]
            whole, last.mlp = last.mlp, Doubled(last.mlp)
            records.append(record(session, step(0)))
            last.mlp = whole
            records.append(record(session, step(0)))
        found.append(records)
    assert_same(found[1], found[0])
    before, doubled, after = (one.output for one in found[1])
    assert torch.equal(before, after)
    assert (before - doubled).abs().max() > 1e-3


def test_the_key_of_a_models_parts_is_another_where_they_change():
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    parts = Parts([model, "no module"])
    first = parts.graph_key
    assert parts.graph_key == first
    model[0].double()  # one part alone, which no weight of another shows
    moved = parts.graph_key
    assert moved != first
    model[0].float()
    assert parts.graph_key == first
    model.load_state_dict({name: value.double() for name, value in model.state_dict().items()}, assign=True)
    assert parts.graph_key not in (first, moved)
    model.float()
    assert parts.graph_key == first
    model[0].register_parameter("more", torch.nn.Parameter(torch.ones(1)))
    more = parts.graph_key
    model.append(torch.nn.Linear(2, 2))
    assert len({first, more, parts.graph_key}) == 3


def test_what_cannot_compile_is_refused_before_the_first_step():
    model = lm()
    untouched = whole_state(model)
    method = vp.FastV(keep=0.25, layer=1)
    with pytest.raises(vp.OptionError, match="compile='yes' was given; it is True or False"):
        method.attach(model, compile="yes", visual=VISUAL)  # type: ignore[arg-type]
    with pytest.raises(vp.OptionError, match="'fast' was given as what compiles; torch has"):
        vp.compiled(model, "fast", visual=VISUAL)
    assert whole_state(model) == untouched
    with method.attach(model, visual=VISUAL) as session:
        with pytest.raises(vp.OptionError, match="'fast' was given"):
            session.compile("fast")
        session.compile("eager")


def test_caches_of_both_kinds_give_the_same_scores():
    """Empty slots of a static cache take no attention, compiled or not."""
    model = lm()
    found = []
    for cache in ("dynamic", "static"):
        with vp.ActionOnly(keep=1.0).attach(model, visual=VISUAL) as session:
            stepper(model, cache)(0)
            found.append(session.scores["action"])
    assert (found[0] - found[1]).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["drop", "text"])
def test_each_autocast_has_programs_of_its_own(name):
    model = lm(backend="eager")
    step = stepper(model)

    def run(session: vp.Session) -> list[Record]:
        found = []
        for dtype in (None, torch.float16, None):
            session.reset()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                found += [record(session, step(scene)) for scene in range(2)]
        return found

    with METHODS[name][0].attach(model, visual=VISUAL) as session:
        expected = run(session)
    with METHODS[name][0].attach(model, visual=VISUAL) as session:
        session.compile("eager")
        actual = run(session)
    assert_same(actual, expected, tolerance=1e-3)
    assert any(one.kept is not None for one in actual)
    assert (actual[1].output - actual[3].output).abs().max() > 1e-4, "autocast must show, or this test could not fail"


def test_a_whole_step_under_autocast_is_chosen_in_float32():
    from tests.families import cases
    from tests.families.matrix import BOTH

    case = cases.small_reference()
    policy = case.build()
    with (
        vp.VLAPruner(keep=0.25, window=1, preset="paper").attach(policy) as session,
        torch.autocast("cpu", torch.bfloat16),
    ):
        session.compile("eager")
        for scene in range(3):
            case.step(policy, scene, BOTH)
        assert session.kept is not None
        assert session.memory is not None
        for score in (*session.scores.values(), session.memory.action):
            assert score.dtype == torch.float32
            assert not torch.equal(score, score.bfloat16().float())
