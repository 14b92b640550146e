"""The policy, its one session, and the memories of all robots: control steps of several robots, in one forward pass if
they may share it. Everything here runs in one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vla_pruner.accelerators import accelerators_of, generator_states, generators_put_back
from vla_pruner.attach.session import Session
from vla_pruner.checkpoints.weights import not_finite
from vla_pruner.errors import VLAPrunerError
from vla_pruner.methods import Memory, Method, Unpruned
from vla_pruner.policies.base import BatchPolicy, Policy, example_of, module_of
from vla_pruner.replacements import undo
from vla_pruner.serving.errors import ServingError, SharedNoiseError
from vla_pruner.serving.logs import log, traceback_of
from vla_pruner.serving.observations import ObservationReader, Seen
from vla_pruner.serving.settings import ServerSettings
from vla_pruner.serving.stages import StepTimer

_LONGEST_WARM_UP = 256


@dataclass
class Robot:
    """The server's memory of one connection.

    Attributes:
        number: for logs.
        memory: of the pruning method; None at the start of an episode.
        episode: the number that began before this one.
        step: control steps of this episode so far.
        instruction: of the last control step; None before the first one.
        state: the robot's state (d,) of the last control step; None before the first one, or if none is sent.
        heard: `time.perf_counter` when the last control step was answered.
    """

    number: int
    memory: Memory | None = None
    episode: int = 0
    step: int = 0
    instruction: str | None = None
    state: np.ndarray | None = None
    heard: float = 0.0

    def episode_begins(self, seen: Seen, now: float, gap: float | None, jump: float | None) -> str | None:
        """Return why an observation begins an episode; None if it goes on with the present one.

        Args:
            seen: the observation.
            now: `time.perf_counter`.
            gap, jump: `episode_gap` and `episode_jump` of `ServerSettings`.
        """
        if not self.step:
            return "it is the first"
        if seen.reset:
            return "the client says so"
        if seen.instruction != self.instruction:
            return "the prompt is another one"
        if gap is not None and now - self.heard > gap:
            return f"{now - self.heard:.1f} s of silence"
        if jump is not None and self.state is not None and seen.proprio is not None:
            same = self.state.shape == seen.proprio.shape
            far = float(np.abs(seen.proprio - self.state).max(initial=0.0)) if same else np.inf
            if far > jump:
                return f"the state jumped by {far:.3g}"
        return None

    def begin_episode(self) -> None:
        """Forget everything but the number of episodes."""
        self.memory, self.instruction = None, None
        self.episode, self.step = self.episode + 1, 0


@dataclass(frozen=True)
class Job:
    """A request for one control step."""

    robot: Robot
    seen: Seen


@dataclass(frozen=True)
class Answer:
    """The result of one control step.

    Attributes:
        actions: (chunk, dim) float.
        timing: milliseconds and numbers of tokens, by name; times are those of the whole pass.
        batch: robots that shared it.
    """

    actions: np.ndarray
    timing: dict[str, float]
    batch: int


@dataclass
class Engine:
    """Runs control steps; `open` attaches the method, and `close` leaves the policy as it was.

    Attributes:
        policy: the one that acts.
        method: the method that prunes; None: nothing is pruned, or pruning was found not to be faster.
        reader: of the observations; its image and action transforms are applied here.
        settings: of the server.
        actions_shape: (chunk, dim) of the policy's actions; known after the warm-up.
        tokens: visual tokens of a control step; known after the warm-up.
    """

    policy: Policy
    method: Method | None
    reader: ObservationReader
    settings: ServerSettings
    actions_shape: tuple[int, ...] = ()
    tokens: int = 0
    _session: Session | None = None
    _timer: StepTimer | None = None
    _devices: list[torch.device] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_method(self.method)

    def open(self) -> None:
        """Attach the method (compiled if the settings say so), and run the policy until every kind of step has run.

        Raises:
            VLAPrunerError: the method does not fit the policy or prunes no step, or the policy does not act, or has
                weights that are not finite.
        """
        method = Unpruned() if self.method is None else self.method
        check_weights(self.policy)
        parameters = module_of(self.policy).parameters()
        self._devices = accelerators_of(parameters)
        self._session = method.attach(self.policy, compile=self.settings.compile)
        try:
            timer = StepTimer(self.policy, self._session.family)
            self._timer = timer.__enter__()
            self._session.clock = timer.stage
            self._warm_up()
            if self.settings.only_if_faster and self.method is not None and not self._pays():
                self.close()
                self.method = None
                self.open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the policy as it was before, whatever fails on the way; then raise the first error."""
        timer, self._timer = self._timer, None
        session, self._session = self._session, None
        undo(
            *([] if timer is None else [lambda: timer.__exit__(None, None, None)]),
            *([] if session is None else [session.detach]),
        )

    def run(self, jobs: Sequence[Job]) -> list[Answer | Exception]:
        """Run one control step of each robot, in batches of those that may share a pass. The answer to one that fails
        is its error, and nothing of it stays with the others.
        """
        answers: dict[int, Answer | Exception] = {}
        for group in self._groups(jobs):
            answers.update(zip(map(id, group), self._run_group(group), strict=True))
        return [answers[id(job)] for job in jobs]

    def prunes(self, robot: Robot) -> bool:
        """Return True if a robot's next control step is pruned."""
        assert self._session is not None
        memory = self._fresh(robot, tokens=1) if robot.memory is None else robot.memory
        return self._session.method.prunes(memory)

    def _groups(self, jobs: Sequence[Job]) -> Iterable[list[Job]]:
        """Yield groups of jobs that one pass can take: all pruned or none, with the same cameras, and images and states
        of one shape each.
        """
        alike: dict[Any, list[Job]] = {}
        for number, job in enumerate(jobs):
            seen = job.seen
            shapes = tuple((camera, image.shape) for camera, image in seen.images.items())
            state = None if seen.proprio is None else seen.proprio.shape
            alone = None if isinstance(self.policy, BatchPolicy) else number
            alike.setdefault((self.prunes(job.robot), shapes, state, alone), []).append(job)
        for group in alike.values():
            start = 0
            while start < len(group):
                size = next(size for size in self.settings.batch_sizes if size <= len(group) - start)
                yield group[start : start + size]
                start += size

    def _run_group(self, group: list[Job]) -> Sequence[Answer | Exception]:
        try:
            return self._step(group)
        except SharedNoiseError as error:
            return [error] * len(group)
        except Exception as error:
            if len(group) == 1:
                return [_told(error)]
        # One of them spoils the pass. Nothing was kept of it, so each can run by itself.
        return [self._run_group([job])[0] for job in group]

    def _step(self, group: list[Job]) -> list[Answer]:
        session, timer, policy = self._session, self._timer, self.policy
        assert session is not None
        assert timer is not None
        robots = [job.robot for job in group]
        memories = [self._fresh(robot) if robot.memory is None else robot.memory for robot in robots]
        session.memory = joined(memories) if self.tokens else None
        with generators_put_back(self._devices):
            # A robot's noise does not depend on the draws of others. Several robots in a pass draw nothing.
            torch.manual_seed(_noise_seed(self.settings.seed, robots[0]))
            with timer.step():
                images = [
                    {camera: self.reader.image(image) for camera, image in job.seen.images.items()} for job in group
                ]
                if len(group) == 1:
                    seen = group[0].seen
                    actions = np.asarray(policy.act(images[0], seen.instruction, seen.proprio))[None]
                else:
                    assert isinstance(policy, BatchPolicy)
                    states = [job.seen.proprio for job in group if job.seen.proprio is not None]
                    undrawn = generator_states(self._devices)
                    actions = policy.act_batch(images, [job.seen.instruction for job in group], states or None)
                    if not all(map(torch.equal, undrawn, generator_states(self._devices))):
                        raise SharedNoiseError(
                            f"{type(policy).__name__}.act_batch draws from torch's generator, so a robot's noise would "
                            "depend on who shares its pass; serve it with --max-batch 1, or draw in act alone."
                        )
        chunks = [np.atleast_2d(self.reader.actions(actions[row])) for row in range(len(group))]
        # Checked before a layout transforms them, which may turn a number that is not finite into one that is, and
        # after it.
        if not all(np.isfinite(found).all() for found in (actions, *chunks)):
            raise ServingError(
                "The policy gave actions that are not finite (NaN or infinity), which no robot may have."
            )
        done, step = session.memory, session.step
        if done is None or step is None or done.rows != len(group):
            raise ServingError("The policy acted without a control step of its decoder, so nothing is known of it.")
        there = step.layout.present_tokens if step.layout.cameras else step.layout.tokens
        kept = there if session.kept is None else session.kept.shape[1]
        timing = {**timer.timing(), "kept_tokens": float(kept), "total_tokens": float(there)}
        after = [done.take([row]) for row in range(len(group))]
        # Nothing fails from here on: the step is done for all of the group or, above, for none.
        self.tokens = step.layout.tokens
        for job, memory in zip(group, after, strict=True):
            job.robot.memory, job.robot.instruction = memory, job.seen.instruction
            job.robot.step += 1
        return [Answer(chunk, timing, len(group)) for chunk in chunks]

    def _fresh(self, robot: Robot, tokens: int | None = None) -> Memory:
        assert self._session is not None
        method = self._session.method
        empty = Memory.empty(
            1,
            method.history,
            self.tokens if tokens is None else tokens,
            semantic=method.remembers_semantic,
            motion=method.motion,
        )
        empty.episode.fill_(robot.episode)
        return empty

    def _warm_up(self) -> None:
        """Run every kind of step: unpruned and pruned, in every size of batch if sizes matter."""
        assert self._session is not None
        method = self._session.method
        example = example_of(self.policy)
        images = {camera: example.images[camera] for camera in self.reader.keys}
        sizes = [1]
        if isinstance(self.policy, BatchPolicy):
            sizes = sorted(self.settings.batch_sizes if self.settings.compile else {1, self.settings.max_batch})
        for prompt in self._prompts(example.instruction):
            seen = Seen(images, prompt, example.proprio)
            for size in sizes:
                robots = [Robot(number) for number in range(size)]
                for _ in range(_LONGEST_WARM_UP):
                    pruned = self.prunes(robots[0])
                    for answer in self.run([Job(robot, seen) for robot in robots]):
                        if isinstance(answer, Exception):
                            raise ServingError(f"The policy's first control step failed: {answer}") from answer
                        self.actions_shape = answer.actions.shape
                    if pruned or isinstance(method, Unpruned):
                        break
                else:
                    raise ServingError(
                        f"{type(method).__name__} as it was made pruned none of the first {_LONGEST_WARM_UP} control "
                        "steps, and no port opens before a pruned step has run; shorten its warm-up."
                    )

    def _pays(self) -> bool:
        """Return True if pruned control steps of one robot are faster than unpruned ones."""
        assert self._session is not None
        self._session.detach_unless_faster()
        example = example_of(self.policy)
        images = {camera: example.images[camera] for camera in self.reader.keys}
        seen = Seen(images, next(iter(self._prompts(example.instruction))), example.proprio)
        robot = Robot(0)
        while self._session.verdict is None:
            for answer in self.run([Job(robot, seen)]):
                if isinstance(answer, Exception):
                    raise ServingError(f"A control step that was timed failed: {answer}") from answer
        return self._session.verdict.faster

    def _prompts(self, usual: str) -> Iterable[str]:
        """Return the instructions that are run before the port opens, each once."""
        default = self.settings.default_prompt
        # A default prompt that the policy cannot read is refused now, and not by every step.
        defaults = () if default is None else (default,)
        return dict.fromkeys((*self.settings.prompts, *defaults)) or (usual,)


def check_method(method: Method | None) -> None:
    """Refuse methods whose steps need more than a memory for each robot.

    Raises:
        ServingError: it is no method, or such a one.
    """
    if method is None:
        return
    if not isinstance(method, Method):
        raise ServingError(f"The pruner is {method!r}; give a Method, such as VLAPruner(keep=0.25), or None.")
    if method.fate.needs_last_step:
        raise ServingError(
            f"{type(method).__name__} reuses keys and values of the last control step, which are not kept for each "
            "robot; serve a method that drops or freezes."
        )
    if method.motion:
        raise ServingError(
            f"{type(method).__name__} as it was made prunes by how far the arm moves, which no message of the protocol "
            "says; serve it without a gate."
        )


def check_weights(policy: Policy) -> None:
    """Refuse weights that are not finite: of their outputs, the most likely token may be a valid one, so that actions
    do not show it. Quantized weights are not checked.

    Raises:
        ServingError: NaN or infinity is among them.
    """
    wrong = not_finite(module_of(policy).named_parameters())
    if wrong:
        raise ServingError(
            f"The policy's weights {wrong[0]!r} hold numbers that are not finite (NaN or infinity), so what it does is "
            "not what it learned; load a checkpoint that is whole."
        )


def joined(memories: Sequence[Memory]) -> Memory:
    """Return one memory of the rows of all, in their order."""
    states = [memory.state_dict() for memory in memories]
    devices = {name: value.device for name, value in states[-1].items()}
    return Memory(**{name: torch.cat([state[name].to(devices[name]) for state in states]) for name in states[0]})


def _noise_seed(seed: int, robot: Robot) -> int:
    return ((seed * 1_000_003 + robot.episode) * 1_000_003 + robot.step) % 2**63


def _told(error: Exception) -> Exception:
    """Return an error as a client may read it: ours are sentences; of others, type and place are for the log alone."""
    if isinstance(error, VLAPrunerError):
        return error
    log.error("A control step failed:\n%s", traceback_of(error))
    return ServingError(f"The policy failed with {type(error).__name__}; the server's log has the details.")
