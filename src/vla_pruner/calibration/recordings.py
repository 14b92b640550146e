"""Recorded episodes to replay: the traces of an evaluation, or a LeRobot dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.calibration.errors import CalibrationError
from vla_pruner.calibration.lerobot_dataset import Dataset, check_finite, is_dataset
from vla_pruner.evaluation.arms import BASELINE
from vla_pruner.evaluation.manifest import MANIFEST, Manifest
from vla_pruner.evaluation.traces import Trace, read_numbers, read_trace, traces_of
from vla_pruner.evaluation.units import Unit
from vla_pruner.observations import Observation

EPISODES = 12
"""The number of episodes that are replayed by default."""
TRACES, DATASET = "traces", "dataset"


@dataclass(frozen=True)
class Recording:
    """The observations of one episode, T control steps long.

    Attributes:
        name: for people.
        unit: gives the noise of each control step, and the draws of random arms.
        images: (T, H, W, 3) uint8 by the policy's camera names.
        instructions: T sentences.
        proprio: (T, d) float32, or None for a policy that takes none.
        steps: (T,) int, the control steps' numbers in the episode as it was recorded.
        actions: (N, dim) float32, all actions that were recorded: their spread is the scale of each dimension.
        chunks: (T, chunk, dim), the results of a trace's policy; None of a dataset.
        paths: (T,) the path that the arm was commanded to go until the next of these control steps, by the first three
            numbers of the actions that were carried out, as in an evaluation; None of a dataset.
    """

    name: str
    unit: Unit
    images: Mapping[str, np.ndarray]
    instructions: tuple[str, ...]
    proprio: np.ndarray | None
    steps: np.ndarray
    actions: np.ndarray
    chunks: np.ndarray | None = None
    paths: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of control steps."""
        return len(self.instructions)

    def observation(self, step: int) -> Observation:
        """Return the arguments of `act` in a control step."""
        images = {name: images[step] for name, images in self.images.items()}
        return Observation(images, self.instructions[step], None if self.proprio is None else self.proprio[step])


@dataclass(frozen=True)
class Recordings:
    """Episodes that were chosen for replay, each read when it is its turn.

    Attributes:
        folder: the folder that holds them.
        kind: `TRACES` or `DATASET`.
        loaders: one for each episode.
        weights: fingerprint of the policy that was traced; None of a dataset.
    """

    folder: Path
    kind: str
    loaders: tuple[Callable[[], Recording], ...]
    weights: str | None = None

    def __len__(self) -> int:
        """Return the number of episodes."""
        return len(self.loaders)


def find_recordings(
    folder: Path,
    policy: Any,
    *,
    tasks: Sequence[str] | None = None,
    episodes: int = EPISODES,
    every: int = 1,
    max_steps: int | None = None,
    cameras: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Recordings:
    """Return the episodes to replay, spread evenly over those in the folder.

    Args:
        folder: an evaluation's with traces of the unpruned policy, or a LeRobot dataset's.
        policy: whose cameras and state they must fit.
        tasks: names of tasks, for a dataset their sentences; None: all.
        episodes: at most so many.
        every: take every n-th step.
        max_steps: control steps of an episode, from its start; None: all.
        cameras: of a dataset, its camera for each of the policy's, by the policy's names; None: by equal names.
        seed: of the noise of flow policies, for a dataset; a trace has its own.

    Raises:
        CalibrationError: there are none, or they do not fit.
        EvaluationError: a trace is damaged.
    """
    if not folder.is_dir():
        raise CalibrationError(
            f"There is no folder {folder}; --from is the --out of an evaluation that ran with --trace, or a LeRobot "
            "dataset."
        )
    cut = slice(None, None if max_steps is None else max_steps * every, every)
    if is_dataset(folder):
        return _of_dataset(folder, policy, tasks, episodes, cut, cameras, seed)
    if cameras:
        raise CalibrationError(f"--camera is for datasets, and {folder} holds no LeRobot dataset; leave it out.")
    return _of_traces(folder, policy, tasks, episodes, cut)


def _of_traces(folder: Path, policy: Any, tasks: Sequence[str] | None, episodes: int, cut: slice) -> Recordings:
    found = {unit: path for (unit, arm), path in traces_of(folder).items() if arm == BASELINE}
    if not found:
        raise CalibrationError(
            f"{folder} holds no traces of the unpruned policy and no LeRobot dataset (meta/info.json); run vla-pruner "
            "eval with --trace 2, or give a dataset's folder."
        )
    _check_tasks(tasks, {unit.task for unit in found}, folder)
    units = [unit for unit in found if tasks is None or unit.task in tasks]
    # Tasks take turns, so that few episodes are of many tasks.
    units.sort(key=lambda unit: (unit.initial_state, unit.suite, unit.task_id))
    for unit in units[:episodes]:  # a damaged trace is refused now, and not after the replay of the episodes before it
        actions, proprio = read_numbers(found[unit])
        check_finite(actions.reshape(-1, actions.shape[-1]), f"an action of {unit}", folder)
        if proprio is not None:
            check_finite(proprio[cut], f"the state of {unit}", folder)

    def loader(unit: Unit) -> Callable[[], Recording]:
        return lambda: _from_trace(found[unit], policy, cut)

    weights = Manifest.read(folder).identity["weights"] if (folder / MANIFEST).exists() else None
    return Recordings(folder, TRACES, tuple(loader(unit) for unit in units[:episodes]), weights)


def _from_trace(path: Path, policy: Any, cut: slice) -> Recording:
    trace = read_trace(path)
    strange = sorted(set(trace.images) ^ set(policy.cameras))
    if strange:
        raise CalibrationError(
            f"{path} was recorded with the cameras {_listed(trace.images)}, and this policy has "
            f"{_listed(policy.cameras)}; calibrate the policy that was traced, or trace this one."
        )
    _check_state(None if trace.proprio is None else trace.proprio.shape[1], policy, str(path))
    return Recording(
        name=str(trace.unit),
        unit=trace.unit,
        images={name: images[cut] for name, images in trace.images.items()},
        instructions=trace.instructions[cut],
        proprio=None if trace.proprio is None else trace.proprio[cut],
        steps=np.arange(len(trace))[cut],
        actions=trace.actions.reshape(-1, trace.actions.shape[-1]),
        chunks=trace.actions[cut],
        paths=_paths(trace, np.arange(len(trace))[cut]),
    )


def _paths(trace: Trace, steps: np.ndarray) -> np.ndarray:
    carried_out = np.diff(trace.steps, append=trace.steps[-1] + trace.actions.shape[1])
    lengths = np.linalg.norm(trace.actions[..., :3], axis=2)
    each = [float(chunk[:number].sum()) for chunk, number in zip(lengths, carried_out, strict=True)]
    return np.add.reduceat(each, steps)


def _of_dataset(
    folder: Path,
    policy: Any,
    tasks: Sequence[str] | None,
    episodes: int,
    cut: slice,
    cameras: Mapping[str, str] | None,
    seed: int,
) -> Recordings:
    dataset = Dataset(folder)
    chosen = dataset.episodes
    if tasks is not None:
        told = [set(dataset.tasks_of(episode)) for episode in chosen]
        _check_tasks(tasks, set().union(*told), folder)
        chosen = [episode for episode, known in zip(chosen, told, strict=True) if known & set(tasks)]
    if not chosen:
        raise CalibrationError(f"{folder} has no episodes; give a dataset that has some.")
    places = np.unique(np.linspace(0, len(chosen) - 1, min(episodes, len(chosen))).round().astype(int))
    keys = _camera_keys(dataset, policy, cameras)
    with_state = policy.proprio_size is not None
    if with_state:
        _check_state(dataset.state_size, policy, str(folder))
    for place in places:  # a damaged episode is refused now, and not after the replay of the episodes before it
        dataset.check_numbers(chosen[place], with_state, cut)

    def loader(place: int) -> Callable[[], Recording]:
        episode = chosen[place]

        def load() -> Recording:
            content = dataset.read(episode, keys, with_state, cut)
            return Recording(
                name=f"episode {episode.index}",
                unit=Unit(folder.name, 0, content.instructions[0], episode.index, seed),
                images=content.images,
                instructions=content.instructions,
                proprio=content.state,
                steps=content.steps,
                actions=content.actions,
            )

        return load

    return Recordings(folder, DATASET, tuple(loader(place) for place in places))


def _camera_keys(dataset: Dataset, policy: Any, cameras: Mapping[str, str] | None) -> dict[str, str]:
    """Return the dataset's feature behind each of the policy's cameras."""
    known = dataset.cameras
    if cameras:
        for name, camera in cameras.items():
            if name not in policy.cameras or camera not in known:
                raise CalibrationError(
                    f"--camera is {name}={camera}; before the sign is one of the policy's cameras "
                    f"({_listed(policy.cameras)}), behind it one of the dataset's ({_listed(known)})."
                )
        named = {**{name: name for name in policy.cameras}, **cameras}
        missing = [name for name, camera in named.items() if camera not in known]
        if missing:
            raise CalibrationError(
                f"--camera says nothing of the policy's camera {missing[0]!r}, and {dataset.folder} has none of that "
                f"name; it has {_listed(known)}. Say which one it is with --camera {missing[0]}=DATASET."
            )
        return {name: known[camera] for name, camera in named.items()}
    if set(policy.cameras) <= set(known):
        return {name: known[name] for name in policy.cameras}
    if len(known) == len(policy.cameras) == 1:
        return {policy.cameras[0]: next(iter(known.values()))}
    raise CalibrationError(
        f"The policy has the cameras {_listed(policy.cameras)}, and {dataset.folder} has {_listed(known)}; say which "
        "is which with --camera POLICY=DATASET, once for each."
    )


def _check_state(recorded: int | None, policy: Any, where: str) -> None:
    if recorded != policy.proprio_size:
        says = ["none" if size is None else f"{size} numbers" for size in (recorded, policy.proprio_size)]
        raise CalibrationError(
            f"The state recorded in {where} has {says[0]}, and this policy takes {says[1]}; it was recorded on another "
            "robot, or for another policy."
        )


def _check_tasks(tasks: Sequence[str] | None, known: set[str], folder: Path) -> None:
    unknown = [task for task in tasks or () if task not in known]
    if unknown:
        raise CalibrationError(f"{folder} has no task {unknown[0]!r}; it has {_listed(sorted(known))}.")


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
