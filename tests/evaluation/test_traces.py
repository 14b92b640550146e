"""Traces: images, actions, scores and kept ids; equal results with and without; kills, full disks, damage, merging."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation.fakes import FakeSource, FakeSuite, ToyFlow, settings, tiny_policy
from tests.evaluation.test_run import UNIT, facts, run
from vla_pruner.evaluation import EvaluationError, Trace, Unit, merge, read_records, read_trace, traces_of
from vla_pruner.evaluation.arms import method_arms
from vla_pruner.evaluation.episode import run_episode
from vla_pruner.evaluation.maps import with_score_maps
from vla_pruner.evaluation.records import EPISODES
from vla_pruner.evaluation.settings import EvalSettings
from vla_pruner.evaluation.traces import TRACES, Grid, Tracer, trace_path, write_trace
from vla_pruner.methods import VLAPruner
from vla_pruner.models.reference import ReferencePolicy


def pruned(out: Path, **changes: Any) -> EvalSettings:
    return settings(out, "tiny", methods=("vla-pruner:window=1",), layer=(1,), controls=("random", "blank"), **changes)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, three starts, four arms; two starts are traced."""
    folder = tmp_path_factory.mktemp("traced")
    assert run(pruned(folder, trace=2))[0] == 0
    return folder


def equal(one: Trace, other: Trace) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
        return type(a) is type(b) and a == b

    fields = [field.name for field in dataclasses.fields(Trace)]
    return all(same(getattr(one, name), getattr(other, name)) for name in fields)


def test_results_are_equal_with_and_without(tmp_path: Path, traced: Path) -> None:
    run(pruned(tmp_path))
    assert facts(tmp_path) == facts(traced)
    assert not (tmp_path / TRACES).exists()


def test_every_traced_episode_of_every_arm_has_one(traced: Path) -> None:
    records = read_records(traced / EPISODES)
    found = traces_of(traced)
    assert set(found) == {record.key for record in records if record.unit.initial_state < 2}
    assert len(found) == 2 * 2 * 4
    for record in records[:8]:
        trace = read_trace(trace_path(traced, *record.key))
        assert trace.key == record.key
        assert (trace.run, trace.success, len(trace)) == (record.run, record.success, record.control_steps)


def test_a_trace_holds_what_the_policy_saw_and_did(traced: Path) -> None:
    of_arms = {
        arm: read_trace(path)
        for (unit, arm), path in traces_of(traced).items()
        if unit == dataclasses.replace(UNIT, initial_state=1)
    }
    plain = of_arms["unpruned"]
    environment = FakeSuite().make(0)
    observation, _ = environment.reset(initial_state=1)
    policy = FakeSource("tiny").load(FakeSuite())
    policy.reset()
    for step in range(len(plain)):
        image = observation.images["corner"]
        assert np.array_equal(plain.images["image"][step], image)
        assert plain.proprio is not None
        assert np.array_equal(plain.proprio[step], observation.proprio)
        assert plain.instructions[step] == "reach the ball"
        unit = dataclasses.replace(UNIT, initial_state=1)
        assert plain.noise_seeds[step] == unit.noise_seed(step)
        torch.manual_seed(unit.noise_seed(step))
        chunk = policy.act({"image": image}, "reach the ball", observation.proprio)
        assert np.array_equal(plain.actions[step], chunk)
        for action in FakeSuite().convention(policy).plan(chunk):
            observation, *_ = environment.step(action)
    assert plain.steps.tolist() == list(range(len(plain)))
    assert plain.kept is None
    assert not plain.pruned.any()
    assert plain.camera_tokens == {"image": 16}
    blank = of_arms["blank-image"]
    assert not blank.images["image"].any()
    assert plain.images["image"].any()


def test_a_pruned_arm_has_kept_tokens_and_scores_of_its_own_step(traced: Path) -> None:
    arm = method_arms(("vla-pruner:window=1",), (0.25,), (1,), None)[0]
    unit = Unit("fake", 1, "push", 1, 0)
    trace = read_trace(trace_path(traced, unit, arm.key))
    policy = tiny_policy()
    assert trace.kept is not None
    assert trace.proprio is not None
    assert trace.kept.shape == (len(trace), 16)
    assert trace.pruned.tolist() == [False] + [True] * (len(trace) - 1)
    assert trace.grids == {"image": Grid(0, 4, 4)}
    assert set(trace.scores) == {"semantic", "action"}
    assert len(trace) > 2
    with arm.attach(policy, unit) as session:
        for step in range(len(trace)):
            state = trace.proprio[step]
            policy.act({"image": trace.images["image"][step]}, trace.instructions[step], state)
            for name, score in session.scores.items():
                assert np.array_equal(trace.scores[name][step], score[0].numpy()), (name, step)
            ids = np.flatnonzero(trace.kept[step]).tolist()
            assert ids == (list(range(16)) if session.kept is None else session.kept[0].tolist())


def test_the_unpruned_arm_has_the_scores_of_all_tokens(traced: Path) -> None:
    unit = Unit("fake", 1, "push", 1, 0)
    plain = read_trace(trace_path(traced, unit, "unpruned"))
    assert {name: score.shape for name, score in plain.scores.items()} == {
        "semantic": (len(plain), 16),
        "action": (len(plain), 16),
    }
    assert all((score > 0).all() for score in plain.scores.values())
    policy = tiny_policy()
    with VLAPruner(keep=1.0, layer=2, preset="paper").attach(policy) as session:
        for step in range(len(plain)):
            seen = plain.observation(step)
            images, instruction, state = seen.images, seen.instruction, seen.proprio
            assert state is not None
            chunk = policy.act(images, instruction, state)
            assert np.array_equal(chunk, plain.actions[step]), "the second look sees the same"
            assert np.array_equal(session.scores["action"][0].numpy(), plain.scores["action"][step])
            assert np.array_equal(session.scores["semantic"][0].numpy(), plain.scores["semantic"][step])
    again = read_trace(trace_path(traced, unit, "blank-image"))
    assert again.scores == {}


def of_one_layer() -> ReferencePolicy:
    """Too shallow for a layer that reads scores."""
    return ReferencePolicy(dataclasses.replace(tiny_policy().config, num_layers=1)).eval()


def compiled() -> ReferencePolicy:
    """Return a policy marked as by `torch.compile`."""
    policy = tiny_policy()
    policy._compiled_call_impl = policy._call_impl
    return policy


@pytest.mark.parametrize("make", [ToyFlow, of_one_layer, compiled])
def test_a_policy_that_nothing_can_be_attached_to_keeps_its_trace(traced: Path, make: Callable[[], Any]) -> None:
    trace = dataclasses.replace(read_trace(trace_path(traced, Unit("fake", 1, "push", 1, 0), "unpruned")), scores={})
    assert with_score_maps(make(), trace) is trace


def test_a_killed_run_rewrites_the_trace_of_what_it_runs_again(tmp_path: Path, traced: Path) -> None:
    run(pruned(tmp_path, trace=2))
    lines = (tmp_path / EPISODES).read_bytes().splitlines(keepends=True)
    (tmp_path / EPISODES).write_bytes(b"".join(lines[:-20]) + lines[-20][:50])
    lost = read_records(traced / EPISODES)[-20]
    path = trace_path(tmp_path, *lost.key)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EvaluationError, match=r"damaged \(.*\)\. Its record is whole: delete the trace"):
        traces_of(tmp_path)
    run(pruned(tmp_path, trace=2))
    assert facts(tmp_path) == facts(traced)
    for key, path in traces_of(traced).items():
        assert equal(read_trace(path), read_trace(trace_path(tmp_path, *key))), key
    assert not list((tmp_path / TRACES).glob("*.new"))


def test_episodes_that_ended_before_are_said_to_lack_one(tmp_path: Path) -> None:
    run(settings(tmp_path, episodes=1))
    code, said = run(settings(tmp_path, trace=1))
    assert code == 0
    assert "6 episodes of those that --trace asks for ended without it and stay untraced" in said
    assert traces_of(tmp_path) == {}
    code, said = run(settings(tmp_path, trace=3, episodes=4))
    assert "18 episodes of those" in said


def test_a_full_disk_ends_the_run_with_one_line_and_loses_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vla_pruner.evaluation import records, traces

    def full(path: Path, content: bytes) -> None:
        import errno

        with monkeypatch.context() as patched:
            patched.setattr(records.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            records.write_bytes(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(traces, "write_bytes", full)
        with pytest.raises(
            EvaluationError, match=r"npz cannot be written \(the disk is full\)\. The episodes are safe"
        ):
            run(settings(tmp_path, trace=1))
    assert read_records(tmp_path / EPISODES) == []
    assert list((tmp_path / TRACES).iterdir()) == []
    assert run(settings(tmp_path, trace=1))[0] == 0
    assert len(traces_of(tmp_path)) == 6


def test_a_crashed_episode_has_none_until_it_ends(tmp_path: Path) -> None:
    crash = tmp_path / "crash"
    crash.touch()
    asked = settings(tmp_path / "run", trace=2, suite_options={"crash": crash})
    assert run(asked)[0] == 1
    assert {unit.initial_state for unit, _ in traces_of(asked.out)} == {0}
    crash.unlink()
    assert run(asked)[0] == 0
    assert {unit.initial_state for unit, _ in traces_of(asked.out)} == {0, 1}


def test_merging_takes_traces_along(tmp_path: Path, traced: Path) -> None:
    for number in (1, 2):
        run(pruned(tmp_path / str(number), trace=2, shard=(number, 2)))
    assert traces_of(tmp_path / "1")
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    merged = traces_of(tmp_path / "merged")
    assert set(merged) == set(traces_of(traced))
    assert all(equal(read_trace(path), read_trace(trace_path(traced, *key))) for key, path in merged.items())


def test_another_disk_is_copied_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(settings(tmp_path / "1", trace=1))

    def no_link(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", no_link)
    merge([tmp_path / "1"], tmp_path / "merged")
    for key, path in traces_of(tmp_path / "1").items():
        assert trace_path(tmp_path / "merged", *key).read_bytes() == path.read_bytes()


def test_a_scripted_policy_is_traced_without_images(tmp_path: Path) -> None:
    run(settings(tmp_path, "expert", trace=1))
    trace = read_trace(next(iter(traces_of(tmp_path).values())))
    assert dict(trace.images) == {}
    assert trace.actions.shape[1:] == (1, 4)


def test_what_cannot_be_traced_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Tracer, record: Any) -> Any:
        raise ValueError("all input arrays must have the same shape")

    monkeypatch.setattr(Tracer, "trace", fails)
    with pytest.warns(UserWarning, match="was not traced: all input arrays"):
        assert run(pruned(tmp_path / "cannot", trace=2))[0] == 0
    monkeypatch.undo()
    run(pruned(tmp_path / "plain"))
    assert facts(tmp_path / "cannot") == facts(tmp_path / "plain")
    assert not traces_of(tmp_path / "cannot")


def test_no_folder_and_no_trace_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"There is no folder .*nowhere"):
        traces_of(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match=r"There is no trace .*; run the evaluation with --trace"):
        read_trace(tmp_path / "x.npz")
    for content in (b"", b"PK\x03\x04zzz", b"nonsense"):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(EvaluationError, match="is damaged"):
            read_trace(tmp_path / "x.npz")
    np.save(tmp_path / "y.npy", np.zeros(3))
    with pytest.raises(EvaluationError, match="is damaged"):
        read_trace(tmp_path / "y.npy")
    with pytest.raises(EvaluationError, match="--trace is -1"):
        settings(tmp_path, trace=-1)


def test_arrays_of_other_lengths_are_damage(tmp_path: Path, traced: Path) -> None:
    trace = read_trace(next(iter(traces_of(traced).values())))
    path = write_trace(tmp_path, dataclasses.replace(trace, steps=trace.steps[:-1]))
    with pytest.raises(EvaluationError, match=r"its arrays are .* control steps long"):
        read_trace(path)


def test_names_of_files_never_meet(tmp_path: Path) -> None:
    keys = [(UNIT, "a b"), (UNIT, "a/b"), (UNIT, "a_b"), (dataclasses.replace(UNIT, suite="metaworld:mt6"), "a_b")]
    keys += [(UNIT, "x" * 400), (UNIT, "x" * 401), (dataclasses.replace(UNIT, policy_seed=5), "a b")]
    paths = {trace_path(tmp_path, *key) for key in keys}
    assert len(paths) == len(keys)
    assert all(path.parent == tmp_path / TRACES and len(path.name) < 200 for path in paths)


def test_scores_are_read_after_the_next_step_has_computed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are read early are work that the timed `act` no longer does."""
    policy, tracer = tiny_policy(), Tracer(("image",))
    arm = method_arms(("vla-pruner",), (0.25,), (1,), ("drop",))[0]
    computed: list[int] = []
    from vla_pruner.attach.reads import DeferredReads

    columns = DeferredReads.columns
    monkeypatch.setattr(DeferredReads, "columns", lambda *given: (computed.append(1), columns(*given))[1])

    def counted(with_tracer: Tracer | None) -> list[int]:
        counts: list[int] = []
        act = policy.act

        def acting(*given: Any) -> np.ndarray:
            before = len(computed)
            chunk = act(*given)
            counts.append(len(computed) - before)
            return chunk

        with monkeypatch.context() as patched:
            patched.setattr(policy, "act", acting)
            run_episode(
                policy, FakeSuite().make(0), FakeSuite().convention(policy), arm, UNIT, run="x", tracer=with_tracer
            )
        return counts

    assert counted(tracer) == counted(None)
    assert sum(counted(None)) > 0
