"""The interface of a simulator, as the evaluation uses it. Another simulator is one more file that offers this.

A `Suite` names tasks and makes their environments. An `Environment` follows Gymnasium: `reset` gives `(observation,
info)`, `step` gives `(observation, reward, terminated, truncated, info)`. It differs in one point: an episode is begun
by the number of its initial state and by nothing else, so that paired arms meet the same start whatever ran before. A
`Convention` says how a policy sees the suite: its cameras, the preparation of its images and actions, and the number of
actions that are carried out before the policy acts again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vla_pruner.errors import SessionError, VLAPrunerError
from vla_pruner.observations import Observation
from vla_pruner.plugins import object_at
from vla_pruner.registry import row_of

Image = np.ndarray
"""(H, W, 3) uint8, RGB, upright."""


class SimulatorUnavailable(RuntimeError):
    """A simulator cannot run on this machine; `fix` is the one line to run."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}. To fix it, run: {fix}")
        self.fix = fix


class SuiteError(VLAPrunerError, ValueError):
    """There is no such suite, task or initial state, or a policy cannot act in it."""


class OutcomeError(ValueError):
    """An environment's report on a step is no valid outcome. That is a crash of its episode, like any other error of
    the environment.
    """


def outcome(reward: Any, terminated: Any, truncated: Any, info: Any) -> tuple[float, bool, bool]:
    """Return the reward, whether the episode is over, and whether it was solved, as an environment's `step` reported
    them.

    An evaluation counts only what an environment reported: NaN, which Python takes for true, is no success.

    Raises:
        OutcomeError: the reward is no finite number, or one of the others is neither True nor False.
    """
    number = isinstance(reward, (int, float, np.number, np.bool_)) and not isinstance(reward, np.complexfloating)
    if not number or not np.isfinite(reward):
        raise OutcomeError(f"The environment's reward is {reward!r}, which is no finite number.")
    if not isinstance(info, Mapping) or "success" not in info:
        raise OutcomeError("The environment's info does not say 'success'.")
    for name, said in (("terminated", terminated), ("truncated", truncated), ("success", info["success"])):
        if not isinstance(said, (bool, np.bool_)):
            raise OutcomeError(f"The environment's {name} is {said!r}, which is neither True nor False.")
    return float(reward), bool(terminated or truncated), bool(info["success"])


def solved(said: Any) -> bool:
    """Return a simulator's report on success as an environment passes it on: True or False; some simulators give 1 and
    0.

    Raises:
        OutcomeError: it is something else, such as NaN, which Python takes for true.
    """
    if not isinstance(said, (bool, np.bool_, int, float, np.number)) or said not in (0, 1):
        raise OutcomeError(f"The simulator says {said!r} where success is True or False, 1 or 0.")
    return bool(said)


class Images(Mapping[str, Image]):
    """A scene's camera images, each drawn when it is first asked for and then kept.

    Args:
        draw: draws the image of a camera by its name.
        cameras: names of the cameras.
        current: returns True while the scene of these images lasts.
    """

    def __init__(self, draw: Callable[[str], Image], cameras: tuple[str, ...], current: Callable[[], bool]) -> None:
        self._draw = draw
        self._cameras = cameras
        self._current = current
        self._drawn: dict[str, Image] = {}

    def __getitem__(self, camera: str) -> Image:
        """Return the camera's image.

        Raises:
            KeyError: there is no such camera.
            SessionError: the scene has moved on and this image had not been drawn.
        """
        if camera not in self._cameras:
            raise KeyError(camera)
        if camera not in self._drawn:
            if not self._current():
                raise SessionError(
                    f"The image of {camera!r} was asked for after the environment had moved on, and images are only "
                    "drawn when they are looked at; look at it before the next step or reset."
                )
            self._drawn[camera] = self._draw(camera)
        return self._drawn[camera]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cameras)

    def __len__(self) -> int:
        return len(self._cameras)

    def __contains__(self, camera: object) -> bool:  # the one of Mapping would draw
        return camera in self._cameras


@dataclass(frozen=True)
class Task:
    """One task of a suite."""

    suite: str
    index: int
    """The place in the suite, from 0: the task id of published tables."""
    name: str
    instruction: str
    max_steps: int
    """Control steps after which an episode is truncated; settling steps are not among them."""
    initial_states: int | None
    """The number of initial states; None: any number from 0 on."""
    ends_at_success: bool = True
    """True if an episode is over once it is solved. If not, it runs for `max_steps`, and its last step says whether it
    was solved.
    """

    def check_initial_state(self, number: int) -> None:
        """Refuse an initial state that the task does not have.

        Raises:
            SuiteError: it is not a number from 0 to below `initial_states`.
        """
        whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
        if whole and number >= 0 and (self.initial_states is None or number < self.initial_states):
            return
        bound = "on" if self.initial_states is None else f"to {self.initial_states - 1}"
        raise SuiteError(
            f"{self.suite} task {self.index} ({self.name}) has initial states from 0 {bound}; found {number!r}."
        )


@runtime_checkable
class Environment(Protocol):
    """One task, ready to run episodes.

    Attributes:
        task: the task.
        images_drawn: camera images drawn so far, in all episodes.
    """

    @property
    def task(self) -> Task: ...
    @property
    def images_drawn(self) -> int: ...

    def reset(self, *, initial_state: int) -> tuple[Observation, dict[str, Any]]:
        """Begin the episode of an initial state, settled: the first observation is the first that a policy sees.

        The same number gives the same episode, whatever ran before.

        Returns:
            the observation, and `info` with "success" (bool).

        Raises:
            SuiteError: the task has no such initial state.
        """
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Run one control step.

        Args:
            action: (action_size,) float, in the simulator's units.

        Returns:
            observation; reward (1.0 on success, else 0.0; finite); terminated (the episode is over, solved); truncated
            (`max_steps` are over, and it is not solved); `info` with "success" (bool): solved in this step. See
            `outcome` and `Task.ends_at_success`.
        """
        ...

    def frame(self, size: int) -> Image:
        """Return (size, size, 3) uint8: the present scene from a viewer's angle, for videos; not counted as drawn."""
        ...

    def close(self) -> None:
        """Free all resources; the environment cannot be used afterwards."""
        ...


@runtime_checkable
class SeesTheState(Protocol):
    """A policy that acts by the simulator's ground truth instead of images, such as a scripted expert.

    This is the only way to the ground truth: the caller calls `watch` with the environment after every `reset` of that
    environment, before the first `act`.
    """

    def watch(self, environment: Environment) -> None: ...


def _as_it_is(array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class Convention:
    """One policy's view of one suite, as its published evaluation had it.

    Attributes:
        cameras: the policy's camera names, and the simulator's camera behind each; only these are drawn.
        proprio: whether the policy is given the robot's state.
        image: prepares an image: upright (H, W, 3) uint8 -> the input of `act`.
        actions: converts a chunk: (chunk, dim) -> (chunk, action_size) in the simulator's units.
        horizon: actions of a chunk that are carried out before the policy acts again; None: the whole chunk.
        repeat: how often each of these actions is carried out.
    """

    cameras: Mapping[str, str]
    proprio: bool
    image: Callable[[Image], Image] = _as_it_is
    actions: Callable[[np.ndarray], np.ndarray] = _as_it_is
    horizon: int | None = None
    repeat: int = 1

    def observe(self, observation: Observation) -> Observation:
        """Return the policy's inputs of an observation: images by its own names of the cameras, and the state if it
        takes one.
        """
        images = {name: self.image(observation.images[camera]) for name, camera in self.cameras.items()}
        return Observation(images, observation.instruction, observation.proprio if self.proprio else None)

    def plan(self, chunk: np.ndarray) -> np.ndarray:
        """Return the actions of a chunk to carry out before the next look: (horizon * repeat, action_size)."""
        return np.atleast_2d(self.actions(np.asarray(chunk)))[: self.horizon].repeat(self.repeat, axis=0)

    def path(self, actions: np.ndarray) -> float:
        """Return the length of the path that `actions` (n, action_size) command, in the simulator's units.

        In every suite the first three numbers of an action displace the gripper.
        """
        return float(np.linalg.norm(actions[:, :3], axis=1).sum())


@runtime_checkable
class Suite(Protocol):
    """A benchmark's tasks.

    Attributes:
        name: as on the command line, "libero_object".
        tasks: in the order of published task ids.
        cameras: the simulator's names of its cameras.
        action_size: numbers in an action.
        settling_steps: steps that `reset` takes before the first observation.
    """

    @property
    def name(self) -> str: ...
    @property
    def tasks(self) -> tuple[Task, ...]: ...
    @property
    def cameras(self) -> tuple[str, ...]: ...
    @property
    def action_size(self) -> int: ...
    @property
    def settling_steps(self) -> int: ...

    def make(self, task: Task | int | str) -> Environment:
        """Return the environment of a task, given by itself, its index or its name.

        Raises:
            SuiteError: there is no such task.
            SimulatorUnavailable: the simulator or its rendering is missing on this machine.
        """
        ...

    def convention(self, policy: Any) -> Convention:
        """Return the convention by which `policy` sees this suite.

        Raises:
            SuiteError: there is none for this policy; the message says which there are.
        """
        ...

    def expert(self) -> Any:
        """Return a scripted policy that solves the tasks by the simulator's state (`SeesTheState`).

        Raises:
            SuiteError: there is none for this suite.
        """
        ...

    def versions(self) -> dict[str, str]:
        """Return the versions of the simulator's packages and the rendering backend, on which a result depends."""
        ...


def convention_of(policy: Any, simulator: str, given: Any) -> Convention | None:
    """Return the convention for a simulator from the row of the policy's family; None if the row has none.

    Args:
        policy: as `load_policy` gives it.
        simulator: a key of `Row.conventions`.
        given: the second argument of the row's function.
    """
    row = row_of(policy)
    path = None if row is None else row.conventions.get(simulator)
    return None if path is None else object_at(path, "function")(policy, given)


def find_task(tasks: tuple[Task, ...], wanted: Task | int | str) -> Task:
    """Return the task given by itself, its index or its name.

    Raises:
        SuiteError: there is no such task.
    """
    for task in tasks:
        if wanted in (task, task.name) or (wanted == task.index and not isinstance(wanted, bool)):
            return task
    names = ", ".join(f"{task.index} {task.name}" for task in tasks)
    raise SuiteError(f"{tasks[0].suite} has no task {wanted!r}; its tasks are {names}.")
