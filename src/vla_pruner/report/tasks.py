"""Paired differences task by task, as a forest plot for every arm; the page shows one at a time."""

from __future__ import annotations

from vla_pruner.evaluation.summary import ArmSummary
from vla_pruner.evaluation.verdict import points
from vla_pruner.report.results import Results
from vla_pruner.report.svg import Axis, Mark, Markup, element, join, linear_axis, strip, strip_axis, swatch
from vla_pruner.statistics import PairedDifference


def task_forests(results: Results) -> Markup:
    """Return one plot for each pruned arm, and the control that chooses among them."""
    arms = [arm for group in results.groups.values() for arm in group if arm.difference_by_task]
    if not arms:
        return Markup("")
    axis = _axis(results, arms)
    options = []
    for method, group in results.groups.items():
        of_group = [element("option", arm.title, value=arm.key) for arm in group if arm.difference_by_task]
        options.append(element("optgroup", *of_group, label=method))
    step = [
        element("button", text, type="button", data_step=by, aria_label=label)
        for text, by, label in (("←", -1, "arm before"), ("→", 1, "next arm"))
    ]
    chooser = element(
        "p", element("label", "Arm ", element("select", *options, id="forest-arm")), *step, class_="controls for-script"
    )
    return join([chooser, *(_forest(results, arm, axis) for arm in arms)], "\n")


def _axis(results: Results, arms: list[ArmSummary]) -> Axis:
    values = [one for arm in arms for one in arm.difference_by_task.values() if one.pairs]
    low = min([one.low for one in values], default=-0.1)
    high = max([one.high for one in values], default=0.1)
    return linear_axis(min(low, -1.6 * results.summary.margin), max(high, results.summary.margin), 8)


def _forest(results: Results, arm: ArmSummary, axis: Axis) -> Markup:
    base, control = results.summary.baseline, results.random_of.get(arm.key)
    margin = results.summary.margin
    items = [element("span", swatch("dot", "accent"), arm.title)]
    if control is not None:
        items.append(element("span", swatch("ring", "random"), control.title))
    rows = [
        element(
            "div",
            element("span", "task", class_="soft"),
            element("span", "unpruned → arm, solved", class_="soft number"),
            strip_axis(axis, "difference to unpruned, percentage points"),
            element("span", "points (95 %)", class_="soft number"),
            class_="row head",
        )
    ]
    suite = ""
    for name in (f"{task.suite}/{task.name}" for task in results.run.manifest.plan.tasks):
        difference = arm.difference_by_task.get(name)
        if difference is None:
            continue
        of_suite, _, task = name.partition("/")
        if len(results.suites) > 1 and of_suite != suite:
            rows.append(element("div", of_suite, class_="suite"))
        suite = of_suite
        drawn = None if control is None else control.difference_by_task.get(name)
        counts = f"{_solved(base, name)} → {_solved(arm, name)}"
        rows.append(_row(axis, task, counts, difference, drawn, margin))
    if arm.difference is not None:
        counts = f"{base.success.successes}/{base.success.total} → {arm.success.successes}/{arm.success.total}"
        drawn = None if control is None else control.difference
        rows.append(_row(axis, "all tasks", counts, arm.difference, drawn, margin, "row all"))
    caption = element("figcaption", element("span", *items, class_="legend"))
    return element("figure", caption, *rows, class_="forest tasks", data_arm=arm.key)


def _row(
    axis: Axis,
    task: str,
    counts: str,
    difference: PairedDifference,
    drawn: PairedDifference | None,
    margin: float,
    kind: str = "row",
) -> Markup:
    figures = f"{points(difference.value)} ({points(difference.low)} to {points(difference.high)})"
    shape = "diamond" if "all" in kind else "dot"
    marks = [Mark(difference.value, difference.low, difference.high, "accent", shape, f"{task}: {figures}")]
    if drawn is not None and drawn.pairs:
        said = f"random on {task}: {points(drawn.value)} ({points(drawn.low)} to {points(drawn.high)})"
        marks.append(Mark(drawn.value, drawn.low, drawn.high, "random", "ring", said))
    return element(
        "div",
        element("span", task, class_="name"),
        element("span", counts, class_="number soft"),
        strip(axis, marks, margin),
        element("span", figures, class_="number"),
        class_=kind,
    )


def _solved(arm: ArmSummary, task: str) -> str:
    solved, total = arm.by_task.get(task, (0, 0))
    return f"{solved}/{total}"
