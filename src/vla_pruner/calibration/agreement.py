"""The agreement of offline and closed-loop rankings: Spearman's correlation over the arms of evaluations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vla_pruner.bootstrap import FEWEST_PAIRS, Estimate, rank_correlation, ranked_groups
from vla_pruner.calibration.errors import CalibrationError
from vla_pruner.calibration.result import ArmCalibration, Calibration
from vla_pruner.errors import OptionError, PluginError
from vla_pruner.evaluation.arms import Arm, all_arms, method_arms
from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.eval_info import EVAL_INFO
from vla_pruner.evaluation.manifest import check_arms
from vla_pruner.evaluation.options import PRUNING, ArmOptions, is_of_older_default
from vla_pruner.json_file import field_of, load_json, typed

PUBLISHED = "summary.json"


@dataclass(frozen=True)
class Pair:
    """One arm offline and in closed loop.

    Attributes:
        moved: as of `ArmCalibration`.
        loss: success rate of the unpruned policy minus the arm's, on paired episodes; in [-1, 1].
        pairs: the number of episodes.
        method: its name without options, or "random".
        setting: its keep and fate, such as "0.25 drop".
    """

    key: str
    moved: float
    loss: float
    pairs: int
    method: str
    setting: str


@dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlations between `moved` and `loss`, with bootstrap intervals over methods.

    Arms of one method are alike, so methods are resampled and not arms; of fewer than 8 methods there is no interval.
    Each loss is itself uncertain by its number of episodes, which draws a correlation towards 0.

    Attributes:
        correlation: over all arms. A smaller keep moves and loses more whatever the method, so it is high even if
            nothing tells one method from another. None: the arms have none.
        within: mean over the settings (keep and fate) that have 4 arms or more and an order; None: none has.
        settings: those settings.
        arms: all that were compared.
        why: the reason why there is no correlation; empty if there is one.
    """

    correlation: Estimate | None
    within: Estimate | None
    settings: list[str]
    arms: list[Pair]
    why: str = ""

    @property
    def methods(self) -> int:
        """The number of methods among the arms, the random choice included."""
        return len({pair.method for pair in self.arms})


def closed_loop_losses(folders: Sequence[Path], weights: str | None = None) -> dict[str, tuple[float, int]]:
    """Return each pruning arm's loss of success rate and its number of pairs, from evaluations' eval_info.json.

    An arm of several evaluations, which then differ in their seed, has the mean over all of its pairs.

    Args:
        folders: of evaluations.
        weights: fingerprint of the policy that they must have run.

    Raises:
        CalibrationError: a file is missing or damaged, or of another policy; they ran other tasks or initial states; or
            one episode would count twice.
    """
    sums: dict[str, tuple[float, int]] = {}
    counted: set[tuple[str, str]] = set()
    contents = [read_eval_info(folder) for folder in folders]
    _check_plans(folders, [content["run"] for content in contents])
    for folder, content in zip(folders, contents, strict=True):
        with_weights = content["run"]["identity"]["weights"]
        if weights is not None and with_weights != weights:
            raise CalibrationError(
                f"{folder} is the evaluation of a policy with other weights ({with_weights}) than were calibrated "
                f"({weights}); give evaluations of the same checkpoint."
            )
        for arm in content["summary"]["arms"]:
            difference, episodes = arm["difference"], (arm["key"], _seeds(content["run"]))
            if episodes in counted:
                continue  # a random control that two evaluations share
            counted.add(episodes)
            # The unpruned policy and blank images lie at the two ends of both orders anyway.
            if arm["kind"] in PRUNING and difference and difference["pairs"]:
                lost, pairs = sums.get(arm["key"], (0.0, 0))
                more = difference["pairs"]
                sums[arm["key"]] = lost - difference["value"] * more, pairs + more
    return {key: (lost / pairs, pairs) for key, (lost, pairs) in sums.items()}


def _check_plans(folders: Sequence[Path], runs: Sequence[Mapping[str, Any]]) -> None:
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise CalibrationError("--against names a folder twice; its episodes would count twice. Name each one once.")
    ran: dict[tuple[str, Any], Path] = {}
    sources: dict[str, tuple[Any, Path]] = {}
    for folder, run in zip(folders, runs, strict=True):
        if _episodes(run) != _episodes(runs[0]):
            raise CalibrationError(
                f"{folders[0]} and {folder} ran other tasks, initial states or step limits, so their losses do not "
                "compare; give evaluations of the same episodes, or join parts of one with vla-pruner eval --merge."
            )
        seeds = _seeds(run)
        for arm in run["identity"]["arms"]:
            source, where = sources.setdefault(arm["key"], (arm.get("source"), folder))
            if source != arm.get("source"):
                raise CalibrationError(
                    f"{where} and {folder} ran the arm {arm['title']!r} with a method from two places or of two "
                    f"versions ({_source(source)} and {_source(arm.get('source'))}); give evaluations of one."
                )
            first = ran.setdefault((arm["key"], seeds), folder)
            if first != folder and arm["kind"] == "method":
                raise CalibrationError(
                    f"{first} and {folder} ran the arm {arm['title']!r} in the same episodes, which would count twice; "
                    "leave one of them out."
                )


def _source(source: Mapping[str, str] | None) -> str:
    return "this package's" if source is None else ", ".join(f"{name} {value}" for name, value in source.items())


def _seeds(run: Mapping[str, Any]) -> str:
    return json.dumps([run.get("plan", {}).get("policy_seed"), run["identity"].get("seed")])


def _episodes(run: Mapping[str, Any]) -> Any:
    """Return the settings of an evaluation's episodes except for their seed."""
    plan, identity = run.get("plan", {}), run["identity"]
    limits = [identity.get(name) for name in ("max_steps", "horizon", "suite_options")]
    return {name: value for name, value in plan.items() if name != "policy_seed"}, limits


def check_shared(arms: Sequence[Arm], folders: Sequence[Path]) -> None:
    """Refuse, before anything slow begins, arms that no evaluation ran.

    Raises:
        CalibrationError: evaluations ran none of them; or as `closed_loop_losses`.
    """
    _check_any([arm.key for arm in arms], closed_loop_losses(folders), folders)


def _check_any(keys: Sequence[str], losses: Mapping[str, Any], folders: Sequence[Path]) -> None:
    if losses.keys().isdisjoint(keys):
        raise CalibrationError(
            f"The calibration shares no pruning arm with {' and '.join(map(str, folders))}, so there is no loss to "
            "compare with; without --method it takes all arms of the evaluations, and without --against none is needed."
        )


def agreement(calibration: Calibration, folders: Sequence[Path]) -> Agreement:
    """Return how well a calibration predicts closed-loop loss, over all arms that it shares with evaluations.

    Raises:
        CalibrationError: they share no arm; or as `closed_loop_losses`.
        PackageMissing: scipy is not installed.
    """
    losses = closed_loop_losses(folders, calibration.weights)
    _check_any([arm.key for arm in calibration.arms], losses, folders)
    ran = [(folder, arm) for folder in folders for arm in read_eval_info(folder)["run"]["identity"]["arms"]]
    _check_sources({arm.key: arm for arm in calibration.arms}, ran)
    options = {arm["key"]: ArmOptions.of(arm) for _, arm in ran if arm["kind"] in PRUNING}
    shared = [
        Pair(arm.key, arm.moved.value, *losses[arm.key], options[arm.key].method, options[arm.key].setting)
        for arm in calibration.arms
        if arm.key in losses and arm.moved is not None
    ]
    sides = [pair.moved for pair in shared], [pair.loss for pair in shared]
    why = _unranked(*sides)
    if why:
        return Agreement(None, None, [], shared, why)
    methods, of = [pair.method for pair in shared], [pair.setting for pair in shared]
    settings = list(map(str, ranked_groups(*sides, of)))
    found = rank_correlation(*sides, methods)
    within = rank_correlation(*sides, methods, of) if settings else None
    return Agreement(found, within, settings, shared)


def _check_sources(arms: Mapping[str, ArmCalibration], ran: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    for folder, arm in ran:
        mine = arms.get(arm["key"])
        if mine is not None and mine.source != arm.get("source"):
            raise CalibrationError(
                f"{folder} ran the arm {arm['title']!r} with {_source(arm.get('source'))}, and it was calibrated "
                f"with {_source(mine.source)}; calibrate the version that was evaluated."
            )


def _unranked(moved: Sequence[float], losses: Sequence[float]) -> str:
    """Return why there is no rank correlation; empty if there is one."""
    if len(moved) < FEWEST_PAIRS:
        return f"it needs {FEWEST_PAIRS} arms that prune and that both ran, and there are {len(moved)}"
    same = [said for values, said in ((moved, "move the action"), (losses, "lose")) if len(set(values)) == 1]
    return f"all {len(moved)} arms that both ran {same[0]} the same, so they have no order" if same else ""


def arms_of(folders: Sequence[Path]) -> list[Arm]:
    """Make the arms that evaluations ran anew from their options.

    Raises:
        CalibrationError: a file is missing or damaged, or an arm cannot be made by this version.
    """
    found: dict[str, Arm] = {}
    for folder in folders:
        wanted = [arm for arm in read_eval_info(folder)["run"]["identity"]["arms"] if arm["kind"] != "baseline"]
        made = [_remade(arm, folder) for arm in wanted if arm["kind"] == "method"]
        controls = [arm["kind"] for arm in wanted if arm["kind"] != "method"]
        arms = {arm.key: arm for arm in all_arms(made, tuple(dict.fromkeys(controls)))}
        missing = [arm["title"] for arm in wanted if arm["key"] not in arms]
        if missing:
            raise _unknown(missing[0], folder)
        found |= {arm["key"]: arms[arm["key"]] for arm in wanted}
    return list(found.values())


def _remade(arm: Mapping[str, Any], folder: Path) -> Arm:
    options = ArmOptions.of(arm)
    if ":" in options.method or not all("=" in word for word in options.own):
        # A file that others wrote must not decide what is imported here, and "module" with "Class" is a path as well.
        raise CalibrationError(
            f"{folder} has the arm {arm['title']!r} of a method that is named by its module, which is not imported "
            "because a file names it; name the arms to calibrate with --method, --keep, --layer and --pruned."
        )
    own = options.own
    if is_of_older_default(arm):
        own = ("preset=paper", *own)
    try:
        (made,) = method_arms(
            [":".join([options.method, *own])],
            [options.keep],
            [options.layer],
            [options.pruned],
            None if options.encoder is None else [options.encoder.keep],
            options.encoder_refresh,
        )
    except (ValueError, TypeError, OptionError, EvaluationError, PluginError) as error:
        raise _unknown(arm["title"], folder) from error
    if own != options.own:
        made = replace(made, key=made.key.replace("-presetpaper", ""), title=options.title, options=options)
    if made.key != arm["key"]:
        raise _unknown(arm["title"], folder)
    return made


def _unknown(title: str, folder: Path) -> CalibrationError:
    return CalibrationError(
        f"{folder} has the arm {title!r}, which this version cannot make; name the arms to calibrate with --method, "
        "--keep, --layer and --pruned."
    )


def read_eval_info(folder: Path) -> dict[str, Any]:
    """Return an evaluation's eval_info.json, or the part of it that was published as summary.json.

    Args:
        folder: of an evaluation or of a published one, or the file itself.

    Raises:
        CalibrationError: it is missing, damaged, or LeRobot's own without arms.
    """
    path = folder if folder.is_file() else folder / EVAL_INFO
    if not path.exists() and (folder / PUBLISHED).exists():
        path = folder / PUBLISHED
    try:
        content = load_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"run", "summary"} <= set(content):
            raise ValueError("it has no arms")
        ran = check_arms(field_of(field_of(content, "run", dict[str, Any]), "identity", dict[str, Any]))
        kinds = {arm["key"]: arm["kind"] for arm in ran}
        typed(dict[str, Any], content["run"].get("plan", {}), "plan")
        for arm in field_of(field_of(content, "summary", dict[str, Any]), "arms", list[dict[str, Any]]):
            key, kind = (field_of(arm, name, str) for name in ("key", "kind"))
            if kinds.get(key) != kind:
                raise ValueError(f"its summary has the arm {key!r} of kind {kind!r}, which did not run")
            difference = field_of(arm, "difference", dict[str, Any] | None)
            if difference and field_of(difference, "pairs", int):
                field_of(difference, "value", float)
        return content
    except OSError as error:
        raise CalibrationError(
            f"{path} cannot be read ({error.strerror}); --against names folders of evaluations that have ended."
        ) from error
    except (ValueError, TypeError) as error:
        raise CalibrationError(f"{path} is damaged, or not of vla-pruner eval ({error}).") from error
