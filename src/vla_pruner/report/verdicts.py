"""The first part of the report: the question, the result, and the controls' view of it."""

from __future__ import annotations

from collections import Counter

from vla_pruner.evaluation.summary import INCONCLUSIVE, NOT_WORSE, WORSE, ArmSummary
from vla_pruner.evaluation.verdict import freezing, judged, limits, points
from vla_pruner.report.results import WORDS, Results
from vla_pruner.report.svg import Axis, Mark, Markup, element, join, linear_axis, strip, strip_axis, swatch
from vla_pruner.wording import counted, span

KINDS = {NOT_WORSE: "good", WORSE: "bad", INCONCLUSIVE: "open"}
SIGNS = {NOT_WORSE: "✓", WORSE: "✕", INCONCLUSIVE: "?"}
UNFOLDED = 12
"""The number of arms up to which nothing is folded."""

_WIDEST = (-0.5, 0.3)
"""The differences beyond which the axis ends: one arm that solves nothing must not squeeze all others."""


def headline(results: Results) -> str:
    """Return the answer in one sentence."""
    summary, arms = results.summary, results.methods
    margin = f"{100 * summary.margin:g} points"
    if not arms:
        base = summary.baseline.success
        return f"The unpruned policy solved {base.successes} of {base.total} episodes; nothing was pruned."
    count = Counter(arm.verdict.word for arm in arms if arm.verdict)
    if len(arms) == 1:
        word = next(iter(count), INCONCLUSIVE)
        said = {
            NOT_WORSE: f"is not worse than the unpruned policy: a loss of {margin} or more is ruled out",
            WORSE: f"is worse than the unpruned policy: a loss of more than {margin} is shown",
            INCONCLUSIVE: f"may or may not be worse than the unpruned policy by {margin}: the episodes do not tell",
        }[word]
        return f"{arms[0].title} {said}."
    if len(count) == 1:
        word = next(iter(count))
        said = {
            NOT_WORSE: f"are not worse than the unpruned policy by {margin} or more",
            WORSE: f"are worse than the unpruned policy by more than {margin}",
            INCONCLUSIVE: f"are inconclusive: the episodes do not tell whether {margin} are lost",
        }[word]
        return f"All {len(arms)} pruned arms {said}."
    parts = []
    for word, said in (
        (NOT_WORSE, f"not worse than the unpruned policy by {margin} or more"),
        (WORSE, f"worse by more than {margin}"),
        (INCONCLUSIVE, "inconclusive"),
    ):
        if count[word]:
            verb = ("is" if count[word] == 1 else "are") if not parts else ""
            parts.append(" ".join(filter(None, (str(count[word]), verb, said))))
    return f"Of {len(arms)} pruned arms {', '.join(parts[:-1])} and {parts[-1]}."


def question(results: Results) -> str:
    """Return the question, its arms, and the number of episodes."""
    summary, plan = results.summary, results.run.manifest.plan
    methods, controls = len(results.methods), len(summary.arms) - len(results.methods) - 1
    part = "" if plan.shard is None else f", shard {plan.shard[0]} of {plan.shard[1]} alone"
    asked = (
        f"Asked: does pruning lose {100 * summary.margin:g} percentage points of success or more? That margin was "
        "declared before the first episode. "
        if methods
        else ""
    )
    others = [counted(n, what) for n, what in ((methods, "pruned arm"), (controls, "control")) if n]
    states = span("initial state", plan.first, plan.episodes)
    ran = f"{', '.join(others)} and the unpruned policy ran the same episodes in turns:" if others else "Unpruned on"
    return (
        f"{asked}{ran} {counted(summary.tasks, 'task')} of {', '.join(results.suites)}, {states} of each{part}, "
        f"{counted(summary.planned, 'episode')} an arm."
    )


def banners(results: Results) -> Markup:
    """Return the limits of every verdict, and the progress of an unfinished run."""
    summary = results.summary
    parts = [element("p", sentence, class_="banner") for sentence in limits(summary)]
    if not summary.complete:
        done = sum(arm.success.total for arm in summary.arms)
        planned = summary.planned * len(summary.arms)
        bar = element("progress", value=done, max=planned, aria_label="episodes finished")
        parts.append(element("p", f"{done:,} of {planned:,} episodes are finished ", bar, class_="soft"))
    if results.was_busy:
        parts.append(
            element("p", "Other programs kept the machine busy: do not quote the milliseconds below.", class_="banner")
        )
    return join(parts, "\n")


def tiles(results: Results) -> Markup:
    """Return the number of arms with each verdict."""
    count = Counter(arm.verdict.word for arm in results.methods if arm.verdict)
    if len(results.methods) < 2:
        return Markup("")
    made = [
        element(
            "div",
            element("b", f"{SIGNS[word]} {count[word]}"),
            element("span", word),
            class_=f"tile {KINDS[word]}",
        )
        for word in WORDS
    ]
    return element("div", *made, class_="tiles")


def difference_axis(arms: list[ArmSummary], margin: float) -> Axis:
    """Return one axis for the differences of all arms, in fractions."""
    differences = [arm.difference for arm in arms if arm.difference is not None and arm.difference.pairs]
    low = max(_WIDEST[0], min([one.low for one in differences], default=-0.1))
    high = min(_WIDEST[1], max([one.high for one in differences], default=0.1))
    return linear_axis(min(low, -1.6 * margin), max(high, margin), 7)


def overview(results: Results) -> Markup:
    """Return every arm's difference with its interval against the margin, grouped by method."""
    arms, margin = results.methods, results.summary.margin
    if not arms:
        return Markup("")
    axis = difference_axis(arms, margin)
    head = element(
        "div",
        element("span"),
        element("span", "pruned arm", class_="soft"),
        strip_axis(axis, "difference to unpruned, percentage points"),
        element("span", "points (95 %)", class_="soft number"),
        class_="row head",
    )
    parts = [head]
    for place, (method, group) in enumerate(results.groups.items()):
        rows = join([_row(results, arm, axis) for arm in group], "\n")
        if len(results.groups) == 1:
            parts.append(rows)
            continue
        is_open = len(arms) <= UNFOLDED or place == 0
        parts.append(
            element(
                "details",
                element("summary", _group_row(results, method, group, axis)),
                rows,
                class_="group",
                open="" if is_open else None,
            )
        )
    folded = "" if len(arms) <= 6 else None
    words = [element("li", element("b", f"{arm.title}: "), judged(arm, results.summary)) for arm in _ordered(results)]
    fates = freezing(results.summary)
    if len(fates) > 1:
        parts.append(element("p", fates.pop(), class_="soft"))  # what all others come to
    words += [element("li", sentence) for sentence in fates]
    parts.append(
        element(
            "details",
            element("summary", "Every verdict in words"),
            element("ul", *words),
            class_="words",
            open=folded,
        )
    )
    return join([_legend(results), element("div", *parts, class_="forest verdicts")], "\n")


def _ordered(results: Results) -> list[ArmSummary]:
    return [arm for group in results.groups.values() for arm in group]


def _legend(results: Results) -> Markup:
    margin = f"{100 * results.summary.margin:g} points"
    items = [
        element("span", swatch("dot", "ink"), "difference to unpruned on the same episodes, line: 95 % interval"),
        element("span", element("i", class_="key loss"), f"a loss of {margin} or more"),
    ]
    if results.random_of:
        items.insert(1, element("span", swatch("ring", "random"), "as many tokens drawn at random"))
    said = [element("p", *items, class_="legend")]
    if len(results.methods) > 1:
        text = f"Verdicts are corrected for the {len(results.methods)} arms that were looked at (Holm); the intervals "
        text += "are not, so one that clears the margin can still be inconclusive."
        if len(results.groups) > 1:
            text += " First comes the method whose best arm loses least at worst."
        said.append(element("p", text, class_="soft small"))
    return join(said)


def _row(results: Results, arm: ArmSummary, axis: Axis) -> Markup:
    difference, verdict = arm.difference, arm.verdict
    word = verdict.word if verdict is not None else INCONCLUSIVE
    kind = KINDS[word]
    if difference is None or not difference.pairs:
        return element(
            "div",
            element("span", "no pairs", class_="badge open"),
            element("span", arm.title),
            element("span"),
            element("span", "no pair yet", class_="soft number"),
            class_="row",
        )
    marks = [
        Mark(difference.value, difference.low, difference.high, kind, "dot", f"{arm.title}: {_figures(arm)}, {word}")
    ]
    control = results.random_of.get(arm.key)
    if control is not None and control.difference is not None and control.difference.pairs:
        d = control.difference
        marks.append(Mark(d.value, d.low, d.high, "random", "ring", f"{control.title}: {_figures(control)}"))
    note = Markup("")
    if not arm.pruned_share:
        note = element("small", "pruned no control step")
    elif verdict is not None and not verdict.at_stake:
        note = element("small", "the unpruned policy solved none of these episodes")
    elif word == INCONCLUSIVE and verdict is not None and verdict.more is not None:
        note = element("small", f"about {_round(verdict.more):,} more episodes a task would decide it")
    elif word == INCONCLUSIVE:
        note = element("small", "no sensible number of episodes would decide it")
    return element(
        "div",
        element("span", f"{SIGNS[word]} {word}", class_=f"badge {kind}"),
        element("span", arm.title, class_="name"),
        strip(axis, marks, results.summary.margin),
        element("span", _figures(arm), note, class_="number"),
        class_="row",
    )


def _group_row(results: Results, method: str, group: list[ArmSummary], axis: Axis) -> Markup:
    """Return all arms of a method on one line, so that a folded group still shows their places."""
    count = Counter(arm.verdict.word for arm in group if arm.verdict)
    marks = [
        Mark(
            arm.difference.value, arm.difference.value, arm.difference.value, KINDS[arm.verdict.word], "dot", arm.title
        )
        for arm in group
        if arm.difference is not None and arm.difference.pairs and arm.verdict is not None
    ]
    counts = join([element("span", f"{SIGNS[w]} {count[w]}", class_=f"count {KINDS[w]}") for w in WORDS if count[w]])
    return element(
        "span",
        element("span", counts, class_="counts"),
        element("span", element("b", method), f" {counted(len(group), 'arm')}", class_="name"),
        strip(axis, marks, results.summary.margin, apart=False),
        element("span", class_="number"),
        class_="row",
    )


def _figures(arm: ArmSummary) -> str:
    d = arm.difference
    assert d is not None
    return f"{points(d.value)} ({points(d.low)} to {points(d.high)})"


def _round(number: int) -> int:
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step
