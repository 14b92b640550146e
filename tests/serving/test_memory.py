"""Each robot has a memory of its own, and a batch is as good as being alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.serving.robots import WAIT, Gated, alone, observation, same_memory, seen
from vla_pruner.client import PolicyClient
from vla_pruner.serving import PolicyServer, ServingError
from vla_pruner.serving.engine import Answer, Engine, Job, Robot
from vla_pruner.serving.observations import reader_of
from vla_pruner.serving.settings import ServerSettings

Serve = Callable[..., PolicyServer]
METHOD = vp.VLAPruner(keep=0.25, preset="paper")


@pytest.fixture
def engine(policy: Any) -> Any:
    engine = Engine(policy, METHOD, reader_of(policy), ServerSettings(max_batch=8))
    engine.open()
    yield engine
    engine.close()


def watch_kept(engine: Engine) -> dict[tuple[int, int], list[int] | None]:
    """Kept ids of each robot and step that the engine runs from now on."""
    kept: dict[tuple[int, int], list[int] | None] = {}
    step = engine._step

    def noted(group: list[Job]) -> Any:
        answers = step(group)
        session = engine._session
        assert session is not None
        for row, job in enumerate(group):
            ids = None if session.kept is None else session.kept[row].tolist()
            kept[job.robot.number, job.robot.step] = ids
        return answers

    engine._step = noted  # type: ignore[method-assign]
    return kept


def ok(answers: Sequence[Answer | Exception]) -> list[Answer]:
    for answer in answers:
        assert isinstance(answer, Answer), answer
    return list(answers)  # type: ignore[arg-type]


def test_thirty_two_robots_each_as_if_it_were_alone(policy: Any, serve: Serve) -> None:
    """Over the wire, at once, in batches: the actions are the same numbers, the kept sets the same ids."""
    server = serve(batch_window=0.01)
    kept = watch_kept(server._engine)
    steps = 6

    def drive(robot: int) -> tuple[int, list[np.ndarray], list[float]]:
        with PolicyClient(server.url, timeout=10 * WAIT) as client:
            replies = [client.infer(observation(policy, robot, step)) for step in range(steps)]
        shared = [reply["server_timing"]["batch_robots"] for reply in replies]
        return robot, [reply["actions"] for reply in replies], shared

    with ThreadPoolExecutor(32) as robots:
        driven = list(robots.map(drive, range(32)))
    assert max(max(shared) for *_, shared in driven) > 4
    # Connections are numbered as they came: which robot had which number, its kept sets tell.
    by_number = [[kept[number, step] for step in range(1, steps + 1)] for number in range(1, 33)]
    server.stop()
    distinct = set()
    for robot, actions, _ in driven:
        expected = alone(policy, METHOD, robot, range(steps))
        assert all(np.array_equal(got, wanted) for got, (wanted, _) in zip(actions, expected, strict=True))
        ids = [ids for _, ids in expected]
        assert ids in by_number
        assert ids[:3] == [None] * 3
        assert all(len(step) == 16 for step in ids[3:] if step is not None)
        distinct.add(repr(ids))
    assert len(distinct) == 32


def test_a_batch_leaves_each_robot_its_own_memory(policy: Any, engine: Engine) -> None:
    robots = [Robot(number) for number in range(5)]
    lone = [Robot(number) for number in range(5)]
    for step in range(5):
        ok(engine.run([Job(robot, seen(policy, robot.number, step)) for robot in robots]))
        for robot in lone:
            ok(engine.run([Job(robot, seen(policy, robot.number, step))]))
    for shared, single in zip(robots, lone, strict=True):
        assert shared.memory is not None
        assert single.memory is not None
        # Sums run in another order in a batch: scores differ by rounding, counters do not.
        torch.testing.assert_close(shared.memory.action, single.memory.action, rtol=0, atol=1e-5)
        assert torch.equal(shared.memory.age, single.memory.age)
        assert (shared.memory.rows, int(shared.memory.steps), shared.step) == (1, 5, 5)


def test_warm_and_new_robots_are_not_in_one_pass(policy: Any, engine: Engine) -> None:
    kept = watch_kept(engine)
    old, new = [Robot(1), Robot(2)], [Robot(3)]
    for step in range(3):
        ok(engine.run([Job(robot, seen(policy, robot.number, step)) for robot in old]))
    answers = ok(engine.run([Job(robot, seen(policy, robot.number, 3)) for robot in (old[0], new[0], old[1])]))
    assert [answer.batch for answer in answers] == [2, 1, 2]
    assert [answer.timing["kept_tokens"] for answer in answers] == [16, 64, 16]
    assert kept[3, 1] is None
    assert kept[1, 4] == alone_again(engine, policy, 1, 4)


def alone_again(engine: Engine, policy: Any, robot: int, steps: int) -> list[int] | None:
    """Kept ids of the last of `steps` of a robot that runs by itself."""
    kept, single = watch_kept(engine), Robot(robot + 1000)
    for step in range(steps):
        ok(engine.run([Job(single, seen(policy, robot, step))]))
    return kept[single.number, steps]


def test_one_that_spoils_a_pass_pays_alone(policy: Any, engine: Engine) -> None:
    good, bad, other = Robot(1), Robot(2), Robot(3)
    wrong = dataclasses.replace(seen(policy, 2), instruction="sing a song")
    answers = engine.run([Job(good, seen(policy, 1)), Job(bad, wrong), Job(other, seen(policy, 3))])
    assert isinstance(answers[1], vp.ObservationError)
    assert bad.memory is None
    single = [Robot(1), Robot(3)]
    for robot, answer in zip(single, (answers[0], answers[2]), strict=True):
        expected = ok(engine.run([Job(robot, seen(policy, robot.number))]))[0]
        assert np.array_equal(ok([answer])[0].actions, expected.actions)
    assert good.memory is not None
    assert single[0].memory is not None
    assert same_memory(good.memory, single[0].memory)


def test_a_failed_step_leaves_the_memory_as_it_was(policy: Any, engine: Engine) -> None:
    robot = Robot(1)
    ok(engine.run([Job(robot, seen(policy, 1))]))
    before = robot.memory
    answer = engine.run([Job(robot, dataclasses.replace(seen(policy, 1), proprio=np.zeros(3, np.float32)))])[0]
    assert isinstance(answer, vp.ObservationError)
    assert robot.memory is before
    assert robot.step == 1


def test_a_pass_that_fails_at_its_end_counts_for_none(policy: Any) -> None:
    """The second row's actions break after the first row's are done: both run again by themselves, and each has made
    one step.
    """
    calls: list[int] = []

    def breaks_at_the_second(chunk: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("the second row")
        return chunk

    engine = Engine(policy, METHOD, reader_of(policy), ServerSettings())
    engine.open()
    robots = [Robot(1), Robot(2)]
    ok(engine.run([Job(robot, seen(policy, robot.number, 0)) for robot in robots]))
    engine.reader = dataclasses.replace(engine.reader, actions=breaks_at_the_second)
    answers = ok(engine.run([Job(robot, seen(policy, robot.number, 1)) for robot in robots]))
    engine.close()
    assert [answer.batch for answer in answers] == [1, 1]
    assert [robot.step for robot in robots] == [2, 2]
    assert [int(robot.memory.steps) for robot in robots if robot.memory is not None] == [2, 2]


@pytest.mark.parametrize("how", ["reset", "prompt"])
def test_an_episode_begins_anew(how: str, policy: Any, serve: Serve) -> None:
    server = serve()
    with PolicyClient(server.url, timeout=10 * WAIT) as client:
        first = [client.infer(observation(policy, 0, step)) for step in range(5)]
        if how == "reset":
            again = [client.infer(observation(policy, 0, 0, reset=True))]
        else:
            again = [client.infer(observation(policy, 1, 0))]
        again += [client.infer(observation(policy, 0 if how == "reset" else 1, step)) for step in range(1, 5)]
    counts = [reply["policy_timing"]["kept_tokens"] for reply in first]
    assert counts == [64, 64, 64, 16, 16]
    assert [reply["policy_timing"]["kept_tokens"] for reply in again] == counts
    same = [np.array_equal(a["actions"], b["actions"]) for a, b in zip(first, again, strict=True)]
    assert all(same) if how == "reset" else not all(same)


def test_the_clients_reset_crosses_the_wire(policy: Any, serve: Serve) -> None:
    server = serve()
    with PolicyClient(server.url, timeout=10 * WAIT) as client:
        for step in range(4):
            assert client.infer(observation(policy, 0, step))["policy_timing"]["kept_tokens"] == (
                64 if step < 3 else 16
            )
        client.reset()
        assert client.infer(observation(policy, 0, 4))["policy_timing"]["kept_tokens"] == 64
        for step in range(5, 7):
            client.infer(observation(policy, 0, step))
        assert client.infer(observation(policy, 0, 7))["policy_timing"]["kept_tokens"] == 16


def test_a_connection_begins_with_nothing_of_another(policy: Any, serve: Serve) -> None:
    server = serve()
    histories = []
    for robot in (1, 2, 1):
        with PolicyClient(server.url, timeout=10 * WAIT) as client:
            histories.append([client.infer(observation(policy, robot, step))["actions"] for step in range(5)])
    assert all(np.array_equal(a, b) for a, b in zip(histories[0], histories[2], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(histories[0], histories[1], strict=True))


def test_random_methods_draw_by_the_robots_own_episode(policy: Any, serve: Serve) -> None:
    """Neither other robots nor earlier connections change the draws; another episode does."""
    server = serve(pruner=vp.RandomKeep(keep=0.25, seed=3))
    kept = watch_kept(server._engine)
    with PolicyClient(server.url) as one, PolicyClient(server.url) as other:
        for step in range(2):
            one.infer(observation(policy, 0, step))
        other.infer(observation(policy, 5, 0))
        other.infer(observation(policy, 5, 1))
        other.infer(observation(policy, 5, 0, reset=True))
    server.stop()
    assert kept[2, 2] == kept[1, 2]
    assert kept[2, 1] != kept[1, 1]  # of its second episode, which began after its second step
    expected = alone(policy, vp.RandomKeep(keep=0.25, seed=3), 0, range(2))
    assert [kept[1, step] for step in (1, 2)] == [ids for _, ids in expected]


def test_noise_is_the_robots_own(policy: Any) -> None:
    """A policy that draws gets the same numbers for the same robot's step, whichever robot ran before; the caller's
    generator is as it was.
    """

    class Drawing(Gated):
        def act(self, *args: Any, **kwargs: Any) -> np.ndarray:
            return super().act(*args, **kwargs) + torch.rand(1).numpy()

    engine = Engine(Drawing(policy), METHOD, reader_of(policy), ServerSettings(seed=5))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    engine.open()
    found = []
    for _ in range(2):
        robot = Robot(0)
        found.append([ok(engine.run([Job(robot, seen(policy, 0))]))[0].actions for _ in range(3)])
        ok(engine.run([Job(Robot(9), seen(policy, 9, 0))]))
    engine.close()
    assert np.array_equal(found[0], found[1])
    assert len({chunk.tobytes() for chunk in found[0]}) == 3  # of one observation, unpruned: noise alone
    assert torch.equal(torch.rand(1), expected)


def test_a_policy_that_draws_in_shared_passes_is_refused(policy: Any) -> None:
    """Its rows would have the noise of their place; one after another they have their own."""

    class Drawing(Gated):
        drawn = True

        def act_batch(self, *args: Any, **kwargs: Any) -> np.ndarray:
            noise = torch.randn(1).numpy() if self.drawn else 0
            return self.module.act_batch(*args, **kwargs) + noise

    drawing = Drawing(policy)
    engine = Engine(drawing, METHOD, reader_of(policy), ServerSettings())
    with pytest.raises(ServingError, match=r"Drawing\.act_batch draws .* --max-batch 1"):
        engine.open()
    alone = Engine(drawing, METHOD, reader_of(policy), ServerSettings(max_batch=1))
    alone.open()
    alone.close()
    drawing.drawn = False
    engine.open()
    drawing.drawn = True  # a policy that draws only now and then
    jobs = [Job(Robot(number), seen(policy, number)) for number in range(2)]
    assert [type(answer).__name__ for answer in engine.run(jobs)] == ["SharedNoiseError"] * 2
    assert [job.robot.step for job in jobs] == [0, 0]
    engine.close()


def test_a_policy_without_batches_runs_one_after_another(policy: Any) -> None:
    engine = Engine(Gated(policy), METHOD, reader_of(policy), ServerSettings())
    engine.open()
    answers = ok(engine.run([Job(Robot(number), seen(policy, number)) for number in range(3)]))
    engine.close()
    assert [answer.batch for answer in answers] == [1, 1, 1]


def test_unpruned_and_the_policy_is_left_as_it_was(policy: Any, serve: Serve) -> None:
    expected = policy.act(
        {"image": seen(policy, 0).images["image"]}, seen(policy, 0).instruction, seen(policy, 0).proprio
    )
    before = {name: sorted(vars(part)) for name, part in policy.named_modules()}
    server = serve(pruner=None)
    with PolicyClient(server.url, timeout=10 * WAIT) as client:
        assert client.metadata["pruner"] == {"name": "none"}
        for _ in range(5):
            reply = client.infer(observation(policy, 0, 0))
            assert np.array_equal(reply["actions"], expected)
            assert reply["policy_timing"]["kept_tokens"] == reply["policy_timing"]["total_tokens"] == 64
    server.stop()
    assert {name: sorted(vars(part)) for name, part in policy.named_modules()} == before
    assert policy.vision.forward.__func__ is type(policy.vision).forward


def test_no_port_opens_before_a_pruned_step_has_run(policy: Any) -> None:
    def pruned_steps(method: Any) -> list[float]:
        engine = Engine(policy, method, reader_of(policy), ServerSettings(max_batch=1))
        step, kept = engine._step, []

        def noted(group: list[Job]) -> Any:
            answers = step(group)
            kept.append(answers[0].timing["kept_tokens"])
            return answers

        engine._step = noted  # type: ignore[method-assign]
        engine.open()
        engine.close()
        return kept

    assert pruned_steps(vp.FastV(keep=0.25, warmup_steps=40)) == [64.0] * 40 + [16.0]
    assert pruned_steps(None) == pruned_steps(vp.methods.Unpruned()) == [64.0]
    with pytest.raises(ServingError, match="FastV as it was made pruned none of the first 256"):
        pruned_steps(vp.FastV(keep=0.25, warmup_steps=256))


def test_compiled_batches_are_powers_of_two() -> None:
    assert ServerSettings(max_batch=6).batch_sizes == (6, 5, 4, 3, 2, 1)
    assert ServerSettings(max_batch=6, compile=True).batch_sizes == (4, 2, 1)
    assert ServerSettings(max_batch=8, compile=True).batch_sizes == (8, 4, 2, 1)


@pytest.mark.parametrize(
    ("method", "message"),
    [(vp.VLACache(keep=0.5), "reuses keys and values"), (vp.TextQuery(keep=0.5, gate=3), "how far the arm moves")],
)
def test_methods_that_need_more_than_a_memory_are_refused(method: Any, message: str, policy: Any) -> None:
    with pytest.raises(ServingError, match=message):
        PolicyServer(policy, method)
    with pytest.raises(ServingError, match="give a Method"):
        PolicyServer(policy, 0.25)  # type: ignore[arg-type]
