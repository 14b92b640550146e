"""`run.json`: the settings and the plan of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.options import PRUNING, ArmOptions, is_of_older_default
from vla_pruner.evaluation.records import Record, write_json
from vla_pruner.evaluation.settings import EvalSettings
from vla_pruner.evaluation.units import Unit, plan, shard
from vla_pruner.json_file import ForeignFile, field_of, read_format, typed
from vla_pruner.simulators.base import Task

FORMAT = "vla-pruner eval 1"
MANIFEST = "run.json"


@dataclass(frozen=True)
class Plan:
    """The units of a run.

    Attributes:
        tasks: of all suites.
        first: the first initial state.
        episodes: of each task and arm.
        shard: (number, count), or None for all.
    """

    tasks: tuple[Task, ...]
    first: int
    episodes: int
    policy_seed: int
    shard: tuple[int, int] | None = None

    def units(self) -> list[Unit]:
        """Return the units in the order in which they run.

        Raises:
            EvaluationError: a task has not that many initial states.
        """
        units = plan(self.tasks, self.episodes, self.first, self.policy_seed)
        return units if self.shard is None else shard(units, *self.shard)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "tasks": [dataclasses.asdict(task) for task in self.tasks]}

    @classmethod
    def from_json(cls, content: Any) -> Plan:
        """Read `to_json`.

        Raises:
            ValueError: it is no selection of episodes; the message says why.
        """
        found = typed(cls, content, "plan")
        if not found.tasks or found.episodes < 1 or found.first < 0 or found.policy_seed < 0:
            raise ValueError("plan selects no episode")
        if found.shard is not None and not 1 <= found.shard[0] <= found.shard[1]:
            raise ValueError(f"plan has the shard {found.shard[0]} of {found.shard[1]}")
        odd = [task for task in found.tasks if task.index < 0 or task.max_steps < 1]
        if odd:
            raise ValueError(
                f"plan has a task {odd[0].name!r} with the number {odd[0].index} and {odd[0].max_steps} steps"
            )
        return found


@dataclass(frozen=True)
class Manifest:
    """A run's settings.

    Attributes:
        identity: all that one record depends on besides its unit, its arm and its suite's versions; and the margin,
            which is declared before the first episode.
        plan: of its units.
        for_claims: whether it is long enough to be evidence.
        extended: numbers of episodes a task that were planned before the present one, in this folder or in one that was
            merged with others: adding episodes after a look raises the chance of a wrong verdict above the nominal one.
        conditions: machine, load and source tree, of every process that wrote to the run.
    """

    identity: Mapping[str, Any]
    plan: Plan
    for_claims: bool
    extended: tuple[int, ...] = ()
    conditions: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)

    @property
    def run(self) -> str:
        """The identity of the run; see `run_of`."""
        return run_of(self.identity)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "run": self.run,
            "identity": self.identity,
            "plan": self.plan.to_json(),
            "for_claims": self.for_claims,
            "extended": list(self.extended),
            "conditions": list(self.conditions),
        }

    def write(self, folder: Path) -> None:
        """Write its file; errors as in `write_json`."""
        write_json(folder / MANIFEST, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read its file.

        Raises:
            EvaluationError: there is none, it is another program's or version's, or it is damaged.
        """
        path = folder / MANIFEST
        try:
            return read_format(path, FORMAT, cls._from_json)
        except OSError as error:
            raise EvaluationError(
                f"{folder} holds no evaluation ({path.name}: {error.strerror}); give the --out of one."
            ) from error
        except ForeignFile as error:
            raise EvaluationError(
                f"{path} is no run of this version of vla-pruner eval ({error}); give the --out of one, or a new "
                "folder to begin one."
            ) from error
        except ValueError as error:
            raise EvaluationError(
                f"{path} is damaged ({error}). The episodes beside it are whole; restore it from a copy or a shard."
            ) from error

    @classmethod
    def _from_json(cls, content: Mapping[str, Any]) -> Manifest:
        found = cls(
            field_of(content, "identity", dict[str, Any]),
            Plan.from_json(field_of(content, "plan", dict[str, Any])),
            field_of(content, "for_claims", bool),
            field_of(content, "extended", tuple[int, ...]),
            field_of(content, "conditions", tuple[dict[str, Any], ...]),
        )
        check_identity(found.identity)
        for one in found.conditions:
            for name in ("policy", "command", "git", "processor", "platform"):
                typed(str | None, one.get(name), name)
            typed(float | None, one.get("busy_cores_before"), "busy_cores_before")
            typed(int | None, one.get("threads"), "threads")
        if found.run != field_of(content, "run", str):
            raise ValueError("its settings were changed")
        return found

    def continued(self, asked: Manifest, folder: Path) -> Manifest:
        """Return the run of a folder, continued with the present settings.

        Raises:
            EvaluationError: they are of another run, or of fewer episodes.
        """
        check_same(self.identity, asked.identity, str(folder), "the command")
        mine, other = self.plan, asked.plan
        if (mine.tasks, mine.first, mine.shard) != (other.tasks, other.first, other.shard):
            raise EvaluationError(
                f"{folder} holds another selection (--suite, --tasks, --first or --shard differ from those that it was "
                "started with); repeat the command that started it, or choose another --out."
            )
        if other.episodes < mine.episodes:
            raise EvaluationError(
                f"{folder} was started with {mine.episodes} episodes a task, and {other.episodes} were asked for now; "
                "give at least as many, or choose another --out."
            )
        extended = (*self.extended, mine.episodes) if other.episodes > mine.episodes else self.extended
        return dataclasses.replace(asked, extended=extended, conditions=(*self.conditions, *asked.conditions))


def identity(settings: EvalSettings, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that one record depends on; plain JSON values.

    Args:
        described: of a `Replica`.
    """
    source = settings.policy
    content = {
        "weights": described["weights"],  # not the path: the same checkpoint lies elsewhere on another machine
        "policy": {
            "device": source.device.partition(":")[0],
            "dtype": source.dtype,
            "options": {name: str(value) for name, value in source.options.items()},
        },
        "seed": settings.seed,
        "arms": [arm.to_json() for arm in settings.arms()],
        "margin": settings.margin,
        "max_steps": settings.step_limit,
        "horizon": settings.horizon,
        "suite_options": {name: str(value) for name, value in settings.suite_options.items()},
    }
    return json.loads(json.dumps(content))


def run_of(identity: Mapping[str, Any]) -> str:
    """Return twelve hexadecimal digits of an identity, which its records carry."""
    return hashlib.sha256(json.dumps(_telling(identity), sort_keys=True).encode()).hexdigest()[:12]


def _telling(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells a run from others: an identity without the arms' options, which their methods hold anyway, so
    that a run whose record does not have them goes on and is merged with others.
    """
    arms = [{name: value for name, value in arm.items() if name != "options"} for arm in identity["arms"]]
    return {**identity, "arms": arms}


def check_identity(content: Any) -> None:
    """Refuse the settings of a file if no table can be made of them.

    Raises:
        ValueError: it names the missing or odd entry.
    """
    arms = check_arms(content)
    keys = [arm["key"] for arm in arms]
    if not arms or arms[0]["kind"] != "baseline" or len(set(keys)) < len(keys):
        raise ValueError("its arms do not begin with the unpruned policy, or two of them have one key")
    margin = field_of(content, "margin", float)
    if not 0 < margin < 1:
        raise ValueError(f"margin is {margin:g}, not a fraction between 0 and 1")
    limit = field_of(content, "max_steps", int | None)
    if limit is not None and limit < 1:
        raise ValueError(f"max_steps is {limit}, not 1 or more")


def check_arms(content: Any) -> list[dict[str, Any]]:
    """Return the arms of a file's settings, each with a key, a title, a kind, and its options if it prunes.

    Raises:
        ValueError: it names the missing or odd entry.
    """
    field_of(content, "weights", str)
    arms = field_of(content, "arms", list[dict[str, Any]])
    for arm in arms:
        for name in ("key", "title", "kind"):
            if not field_of(arm, name, str).strip():
                raise ValueError(f"an arm has an empty {name}")
        typed(str | None, arm.get("random"), "random")
        typed(str | None, arm.get("encoder"), "encoder")
        typed(dict[str, str] | None, arm.get("source"), "source")
        if arm["kind"] in PRUNING:
            ArmOptions.of(arm)
    return arms


def check_same(mine: Mapping[str, Any], other: Mapping[str, Any], where: str, there: str) -> None:
    """Refuse two identities that differ.

    Raises:
        EvaluationError: it names what differs.
    """
    mine, other = _telling(mine), _telling(other)
    differing = [name for name in sorted({*mine, *other}) if mine.get(name) != other.get(name)]
    if differing:
        told = "; ".join(_told(name, mine.get(name), other.get(name)) for name in differing)
        sides = ((where, mine), (there, other)) if "arms" in differing else ()
        older = [name for name, one in sides if any(map(is_of_older_default, one["arms"]))]
        advice = "choose another --out, or repeat the command that started it."
        if older:
            advice = (
                f"{older[0]} is from before 28 November 2026, when vla-pruner was preset=paper by default, and the "
                "version that began it continues it. In another --out, --method vla-pruner:preset=paper has its rule."
            )
        raise EvaluationError(
            f"{where} was run with other settings than {there} ({told}). Results of two settings do not mix: {advice}"
        )


def _told(name: str, mine: Any, other: Any) -> str:
    if name == "arms" and _keys(mine) == _keys(other):
        # Arms of one name may still differ: for instance by the version of a method from outside.
        for one, another in zip(mine, other, strict=True):
            odd = [field for field in sorted({*one, *another}) if one.get(field) != another.get(field)]
            if odd:
                words = f"{_short(one.get(odd[0]))}, not {_short(another.get(odd[0]))}"
                return f"{odd[0]} of the arm {one['title']!r}: {words}"
    return f"{name}: {_short(mine)}, not {_short(other)}"


def _keys(arms: Any) -> list[Any]:
    return [arm.get("key") for arm in arms] if isinstance(arms, list) else [arms]


def _short(value: Any) -> str:
    if isinstance(value, list):
        value = [one.get("key", one) if isinstance(one, dict) else one for one in value]
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."


def check_versions(records: Sequence[Record], here: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Refuse episodes of one suite that ran on different versions.

    Args:
        here: by suite, the versions that further episodes would run on.

    Raises:
        EvaluationError: it names a version that differs.
    """
    seen = {suite: dict(versions) for suite, versions in (here or {}).items()}
    for record in records:
        if not record.versions:
            continue
        known = seen.setdefault(record.unit.suite, record.versions)
        differing = [name for name in {*known, *record.versions} if known.get(name) != record.versions.get(name)]
        if differing:
            name = sorted(differing)[0]
            raise EvaluationError(
                f"Episodes of {record.unit.suite} ran on different versions ({name} {known.get(name)} and "
                f"{record.versions.get(name)}), which can change a success rate by itself. Install the version that "
                "the run was started with, or choose another --out."
            )
