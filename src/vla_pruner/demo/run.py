"""The demo from its flags to its table, report and result file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vla_pruner.conditions import busy_cores
from vla_pruner.demo import results
from vla_pruner.demo.arms import Arm, UncompiledArms, default_arms
from vla_pruner.demo.compiled import BACKEND, CompiledArms, failed, why_not
from vla_pruner.demo.conditions import conditions
from vla_pruner.demo.episodes import Environment, OpenedArms, Runner, Unit, plan
from vla_pruner.demo.probe import ArmCost, arm_cost, timer_overhead, vision_flops
from vla_pruner.demo.scenes import scenes, suite_of
from vla_pruner.demo.settings import SUITES, DemoError, DemoSettings, choose_tasks
from vla_pruner.demo.summary import Summary, summarize
from vla_pruner.demo.table import footnotes, to_markdown, to_rich
from vla_pruner.demo.verdict import headline, verdict
from vla_pruner.errors import CheckpointError, UnsupportedModelError
from vla_pruner.families import family_of
from vla_pruner.observations import Observation
from vla_pruner.outputs import replace_file
from vla_pruner.terminal import INTERRUPTED, LogLines, progress, remark, say, waiting
from vla_pruner.wording import counted

FRAME_SIZE, PAIR_SIZE = 224, 160
"""Height of the report's frames, of one camera and of several; the policy sees its own, smaller images."""


_SAY_EVERY = 15.0
"""Seconds between lines of progress if no bar can be drawn."""

_BUSY = 0.15
"""The share of the cores, used by other programs, above which milliseconds are no longer to be trusted."""


def run_demo(
    settings: DemoSettings,
    console: Console,
    policy: Any = None,
    environments: Callable[[str], Environment] | None = None,
    arms: Sequence[Arm] | None = None,
    backend: str = BACKEND,
) -> int:
    """Run the demo and write its files.

    Args:
        settings: of the run.
        console: for progress and the table.
        policy, environments, arms: stand-ins for tests; None for the real ones.
        backend: what compiles, as in `torch.compile`.

    Returns:
        The exit code: 0, or 130 if it was interrupted.

    Raises:
        DemoError: it cannot run as asked. (`SimulatorUnavailable` if the simulator is missing.)
    """
    settings.check()
    weights = None
    if policy is None:
        policy, weights = _load_policy(settings.policy)
    suite = suite_of(policy)
    if suite not in SUITES:
        raise DemoError(f"The weights were trained in {suite!r}; the demo runs policies of {', '.join(SUITES)}.")
    if settings.suite not in (None, suite):
        raise DemoError(f"--suite is {settings.suite}, and the weights were trained on {suite}; leave one of them out.")
    first = settings.first_state(suite)
    tasks = choose_tasks(settings.tasks, tuple(task for task, _ in policy.config.tasks))
    facts = conditions(policy, weights) | {"suite": suite, "first_initial_state": first}
    busy = _warn_if_busy(facts, console)
    arms = default_arms(settings.keep) if arms is None else arms
    size = FRAME_SIZE if len(policy.cameras) == 1 else PAIR_SIZE
    runner = Runner(arms, environments or scenes(policy), size)
    started = time.monotonic()
    interrupted, prepared = False, None
    units = plan(tasks, settings.episodes_a_task, first)
    held = ExitStack()
    held.callback(runner.close)
    try:
        threads = counted(facts["threads"], "thread")
        remark(console, f"{counted(len(tasks), 'task')} ({', '.join(tasks)}), {len(arms)} arms, {threads}.")
        observation = runner.environment(tasks[0]).reset(first)
        facts["rendering"] = os.environ.get("MUJOCO_GL")  # the simulator has chosen by now
        prepared = _prepare(policy, arms, observation, settings, backend, console, held)
        _run(runner, units, prepared, settings, console)
    except KeyboardInterrupt:
        interrupted = True
        say(console, "\nInterrupted: the table has what was finished.")
    finally:
        held.close()
    if prepared is None or not runner.finished:
        say(console, "No episode was finished by all arms, so there is nothing to show.")
        return INTERRUPTED
    compiling = prepared.opened.compiling if isinstance(prepared.opened, CompiledArms) else None
    depth = family_of(policy).depth
    used = busy_cores()
    busy = busy or _is_busy(used, facts)
    summary = summarize(runner.finished, arms, prepared.costs, prepared.vision, depth, compiling, busy)
    notes = {
        "interrupted": interrupted,
        "machine_was_busy": busy,
        "busy_cores_after": used,
        "seconds": round(time.monotonic() - started, 1),
        "timer_overhead_ms": round(prepared.overhead, 4),
        "planned_episodes": len(units),
        "compiled": None if compiling is None else compiling.to_json(),
        "why_not_compiled": prepared.why_not_compiled,
    }
    _finish(settings, console, runner, summary, facts, notes)
    return INTERRUPTED if interrupted else 0


@dataclass(frozen=True)
class _Prepared:
    """Everything that is there before the first episode.

    Attributes:
        opened: begins the episodes of each arm.
        costs: by the arm's key.
        vision: FLOPs of the vision encoder in a control step.
        overhead: milliseconds that the stage timer adds to a control step.
        minutes: time that compiling left for the episodes; None: they have no limit.
        why_not_compiled: the sentence that says why no arm is compiled; None: they are, or were not to be.
    """

    opened: OpenedArms
    costs: dict[str, ArmCost]
    vision: float
    overhead: float
    minutes: float | None
    why_not_compiled: str | None


def _prepare(
    policy: Any,
    arms: Sequence[Arm],
    observation: Observation,
    settings: DemoSettings,
    backend: str,
    console: Console,
    held: ExitStack,
) -> _Prepared:
    """Count FLOPs, compile the arms if they are to be (they stay so until `held` closes), and time the timer."""
    costs = {arm.key: arm_cost(policy, arm, observation) for arm in arms}
    vision = vision_flops(policy, observation)
    opened: OpenedArms = UncompiledArms(policy)
    left, why = settings.minutes, None
    if settings.compiles:
        began = time.monotonic()
        made, why = _compile(policy, arms, observation, backend, console)
        if made is not None:
            opened = held.enter_context(made)
        left = None if left is None else max(0.0, left - (time.monotonic() - began) / 60)
    with opened.open(arms[0], 0) as (unpruned, _):
        overhead = timer_overhead(unpruned, observation)
    return _Prepared(opened, costs, vision, overhead, left, why)


def _load_policy(name: str | Path) -> tuple[Any, Path]:
    from vla_pruner.models.saved import WEIGHTS
    from vla_pruner.policies.reference import policy_folder, reference_policy

    try:
        return reference_policy(name), policy_folder(name) / WEIGHTS
    except (CheckpointError, UnsupportedModelError) as error:
        raise DemoError(str(error)) from error


def _is_busy(used: float | None, facts: dict[str, Any]) -> bool:
    return used is not None and used > _BUSY * (facts["cores"] or 1)


def _warn_if_busy(facts: dict[str, Any], console: Console) -> bool:
    used = facts["busy_cores_before"]
    busy = _is_busy(used, facts)
    if busy:
        say(
            console,
            f"Note: other programs keep this machine busy ({used:g} of {facts['cores']} cores). Success rates are not "
            "affected; milliseconds are, so repeat the run on an idle machine before quoting them.",
        )
    return busy


def _compile(
    policy: Any,
    arms: Sequence[Arm],
    observation: Observation,
    backend: str,
    console: Console,
) -> tuple[CompiledArms | None, str | None]:
    """Return every arm compiled, or None and the sentence that says why none is."""
    refusal = why_not(backend)
    if refusal is None:
        remark(console, f"Compiling {counted(len(arms), 'arm')}, once for all episodes; --no-compile leaves it out.")

        def tell(arm: Arm, seconds: float) -> None:
            remark(console, f"Compiled: {arm.title}, in {seconds:.0f} s.")

        try:
            with waiting(console, "compiling"):
                return CompiledArms(policy, arms, observation, backend, tell), None
        except Exception as error:  # whatever a compiler cannot do: each arm has run without it before
            refusal = failed(error)
    say(console, refusal)
    return None, refusal


def _run(
    runner: Runner,
    units: Sequence[Unit],
    prepared: _Prepared,
    settings: DemoSettings,
    console: Console,
) -> None:
    titles = {arm.key: arm.title for arm in runner.arms}
    total = len(units) * len(runner.arms)
    lines = LogLines(console, total, "episodes", every=_SAY_EVERY)
    with progress(console, note=True) as shown:
        bar = shown.add_task("episodes", total=total, note="")
        for done, episode in enumerate(runner.run(units, prepared.opened, prepared.minutes), 1):
            result = "solved" if episode.success else "not solved"
            note = f"{episode.unit.task}, {titles[episode.arm]}: {result} in {episode.steps} steps"
            shown.update(bar, advance=1, note=note)
            lines.at(done)
    if len(runner.finished) < len(units):
        say(
            console,
            f"Stopped after {settings.minutes:g} minutes{' with compiling' if settings.compiles else ''}: "
            f"{len(runner.finished)} of {len(units)} paired episodes; "
            "--episodes N runs all that it asks for.",
        )


def _finish(
    settings: DemoSettings,
    console: Console,
    runner: Runner,
    summary: Summary,
    facts: dict[str, Any],
    notes: dict[str, Any],
) -> None:
    from vla_pruner.demo.page import write_report

    why_not_compiled = notes["why_not_compiled"]
    sentences = [headline(summary), *verdict(summary), *([] if why_not_compiled is None else [why_not_compiled])]
    say(console)
    console.print(to_rich(summary))
    for note in footnotes(summary):
        say(console, note, style="dim")
    say(console)
    for sentence in sentences:
        say(console, f"- {sentence}")
    content = results.to_json(settings, facts, runner.finished, summary, sentences, notes)
    results.write(settings.out / "results.json", content)
    replace_file(settings.out / "table.md", to_markdown(summary).encode())
    report = settings.out / "report.html"
    write_report(report, summary, runner.finished, sentences, facts, notes)
    say(console)
    say(console, f"Report: {report.resolve()}", soft_wrap=True)
    say(console, f"Results: {(settings.out / 'results.json').resolve()}", soft_wrap=True)
