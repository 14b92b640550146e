"""The conclusions in plain sentences. Every sentence is computed from the numbers; none is written in advance."""

from __future__ import annotations

from vla_pruner.evaluation.settings import CLAIM_EPISODES
from vla_pruner.evaluation.summary import INCONCLUSIVE, NOT_WORSE, ArmSummary, Summary
from vla_pruner.statistics import PairedDifference
from vla_pruner.wording import counted


def sentences(summary: Summary) -> list[str]:
    """Return the verdicts first, then the controls' results, then the limits of all of them."""
    found = [f"{arm.title}: {judged(arm, summary)}" for arm in summary.of("method")]
    return [*found, *freezing(summary), *noise_floor(summary), *blank_image(summary), *limits(summary)]


def points(value: float) -> str:
    """Return a difference of rates in percentage points: "+1.5", "-2", "0"."""
    text = f"{100 * value:+.1f}".removesuffix(".0")
    return "0" if text in ("+0", "-0") else text


def spread(difference: PairedDifference) -> str:
    """ "-1.5 points (-4 to +0.5)"."""
    return f"{points(difference.value)} points ({points(difference.low)} to {points(difference.high)})"


def judged(arm: ArmSummary, summary: Summary) -> str:
    """Return the sentences on a method's arm: verdict with interval, meaning, what would decide it, and random
    choice.
    """
    difference, verdict = arm.difference, arm.verdict
    if difference is None or verdict is None or not difference.pairs:
        return "no episode was finished by it and by the unpruned policy."
    if not arm.pruned_share:
        return (
            "it pruned no control step, so it is the unpruned policy once more: its episodes end before its history "
            "is full, or it keeps all tokens."
        )
    margin = f"{100 * summary.margin:g} points"
    head = f"{verdict.word}, {spread(difference)} against unpruned on {counted(difference.pairs, 'pair')}"
    if not verdict.at_stake:
        return f"{head}, of which the unpruned policy solved none: there is nothing that pruning could lose."
    if verdict.word == NOT_WORSE:
        return f"{head}: a loss of {margin} or more is ruled out.{_random(arm)}"
    if verdict.word != INCONCLUSIVE:
        return f"{head}: a loss of more than {margin} is shown.{_random(arm)}"
    shown = arm.p_adjusted is not None and arm.p_adjusted <= 0.05 and difference.value < 0
    what = (
        f"a loss is shown, but not whether it is more than {margin}"
        if shown
        else f"neither a loss of {margin} nor its absence is shown"
    )
    if verdict.more is None:
        more = "The difference is so close to the margin that no sensible number of episodes would decide it."
    else:
        more = f"About {_rounded(verdict.more)} more episodes a task would decide it, if this is the truth."
    return f"{head}: {what}. {more}{_random(arm)}"


def _rounded(number: int) -> int:
    """Round to two digits: more would claim too much precision."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step


def _random(arm: ArmSummary) -> str:
    chosen = arm.against_random
    if chosen is None or not chosen.pairs:
        return ""
    if chosen.within_noise:
        return f" That choosing beats drawing at random is not shown: {spread(chosen)}."
    if chosen.value > 0:
        return f" Choosing beats drawing at random: {spread(chosen)}."
    return f" Drawing at random did better: {spread(chosen)}."


def freezing(summary: Summary) -> list[str]:
    """Say whether freezing solves more than dropping, setting by setting and, of several, in how many; empty without
    arms that differ in this alone.
    """
    found, more, less = [], 0, 0
    for arm in summary.of("method"):
        frozen = arm.against_drop
        if frozen is None or not frozen.pairs:
            continue
        head = f"{arm.title} against the same dropped: {spread(frozen)} on {counted(frozen.pairs, 'pair')}"
        if frozen.within_noise:
            found.append(f"{head}: no difference is shown.")
        elif frozen.value > 0:
            more += 1
            found.append(f"{head}: freezing solves more.")
        else:
            less += 1
            found.append(f"{head}: dropping solves more.")
    if len(found) > 1:
        settings = len(found)
        found.append(
            f"Freezing or dropping, in {settings} settings: freezing solves more in {more}, dropping in {less}, and no "
            f"difference is shown in {settings - more - less}. Each has a 95 % interval of its own, so one of many may "
            "differ by chance."
        )
    return found


def noise_floor(summary: Summary) -> list[str]:
    """Say how far two runs of the unpruned policy agree; empty without that control."""
    found = []
    for arm in summary.of("again"):
        again = arm.difference
        if again is None or not again.pairs:
            continue
        disagreed = again.gained + again.lost
        share = f"{disagreed} of {counted(again.pairs, 'episode')} ({100 * disagreed / again.pairs:.1f} %)"
        if disagreed:
            found.append(f"Noise floor: two runs of the unpruned policy disagree on {share}.")
        else:
            # n agreements rule out with 95 % a share p of which (1 - p)^n = 5 %.
            most = 100 * (1 - 0.05 ** (1 / again.pairs))
            found.append(
                f"Noise floor: two runs of the unpruned policy agree in {again.pairs} of "
                f"{counted(again.pairs, 'episode')}; that they disagree on more than {most:.2g} % is ruled out (95 %)."
            )
    return found


def blank_image(summary: Summary) -> list[str]:
    """Say whether the policy needs to see; empty without that control."""
    found = []
    for arm in summary.of("blank"):
        blank = arm.difference
        if blank is None or not blank.pairs:
            continue
        solved = f"With black images the policy solves {_rate(arm)}, against {_rate(summary.baseline)}"
        if blank.high < 0:
            found.append(f"{solved}: it needs to see, so pruning can show.")
        else:
            found.append(
                f"{solved}: it is not shown that it needs to see, and what needs no image survives any pruning."
            )
    return found


def _rate(arm: ArmSummary) -> str:
    return f"{arm.success.successes} of {arm.success.total}"


def limits(summary: Summary) -> list[str]:
    """Say what limits every verdict: crashes, episodes that are left, a second look, a run too short for claims."""
    found = []
    solved, total = summary.baseline.success.successes, summary.baseline.success.total
    if total and not solved:
        found.append("The unpruned policy solved nothing, so nothing can be said about pruning it.")
    elif 2 * solved < total:
        share = summary.margin * total / solved
        found.append(
            f"The unpruned policy solved only {solved} of {total}, and where it fails, pruning can lose nothing: a "
            f"loss of {100 * summary.margin:g} points would be "
            f"{f'{100 * share:.0f} % of' if share < 1 else 'more than'} what it solves."
        )
    if summary.crashed:
        found.append(
            f"{counted(summary.crashed, 'episode')} crashed. They count neither as solved nor as failed; the "
            "same command runs them again."
        )
    missing = max((summary.planned - arm.success.total - arm.crashed for arm in summary.arms), default=0)
    if missing:
        found.append(
            f"The run is not finished: up to {missing} of {summary.planned} episodes an arm are left; the same command "
            "runs them."
        )
    if summary.extended:
        asked = ", ".join(map(str, summary.extended))
        found.append(
            f"Episodes were added after a first look (at {asked} a task), so a wrong verdict is likelier than 5 %; "
            "confirm it on other initial states (--first) before claiming it."
        )
    wanted = [arm.verdict.more for arm in summary.of("method") if arm.verdict and arm.verdict.more]
    if summary.left is not None and wanted and max(wanted) > summary.left:
        found.append(
            f"A task has {counted(summary.left, 'initial state')} left, fewer than some of these verdicts ask for; add "
            "tasks or suites instead."
        )
    if not summary.for_claims:
        found.append(
            f"Not for claims: whole episodes and at least {CLAIM_EPISODES} of them a task and arm (--preset standard) "
            "are evidence, this is a look."
        )
    return found
