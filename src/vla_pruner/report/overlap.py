"""The overlap of the policy's reading and acting maps: figure 2 of arXiv 2511.16449, for any traced policy.

Overlap is the share of the k highest tokens of one map that are among the k highest of another. It is 1 for two maps
alike, and k / M for two unrelated ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from vla_pruner.evaluation.traces import Trace
from vla_pruner.report.plot import Plot
from vla_pruner.report.svg import Axis, Markup, element, join, linear_axis, swatch
from vla_pruner.statistics import MeanDifference, paired_mean_difference

SHARES = (0.5, 0.25, 0.125)
"""The shares of the visual tokens that the paper looks at."""

_PAPER = {0.5: (72, 95), 0.25: (59, 93), 0.125: (52, 89)}
"""OpenVLA's overlaps in percent: semantic with action, and action with the step before."""

_BAND = (10, 90)


@dataclass(frozen=True)
class Overlap:
    """The overlaps of one episode of T control steps, with k tokens.

    Attributes:
        maps: (T,) float64, the semantic with the action map; nan if a step lacks one.
        before: (T,) float64, the action map with that of the step before; nan in the first step.
        chance: k / M.
    """

    maps: np.ndarray
    before: np.ndarray
    chance: float


def overlap(semantic: np.ndarray, action: np.ndarray, k: int) -> Overlap:
    """Return the overlaps of two maps over an episode.

    Args:
        semantic, action: (T, M); rows with nan have no map.
        k: 1 to M tokens.
    """
    first, second = top_tokens(semantic, k), top_tokens(action, k)
    maps = np.where(_whole(semantic) & _whole(action), (first & second).sum(1) / k, nan)
    before = np.full(len(action), nan)
    both = _whole(action)[1:] & _whole(action)[:-1]
    before[1:] = np.where(both, (second[1:] & second[:-1]).sum(1) / k, nan)
    return Overlap(maps, before, k / semantic.shape[1])


def tokens_of(share: float, total: int) -> int:
    """Return k for a share of all tokens; at least 1."""
    return max(1, round(share * total))


def top_tokens(scores: np.ndarray, k: int) -> np.ndarray:
    """Return (T, M) bool, the k highest of each row, the smaller id first among equals."""
    order = np.argsort(-np.nan_to_num(scores), axis=1, kind="stable")[:, :k]
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, order, True, axis=1)
    return found


def _whole(scores: np.ndarray) -> np.ndarray:
    return np.logical_not(np.isnan(scores).any(axis=1))


def has_maps(trace: Trace) -> bool:
    """Return True if the trace has both maps."""
    return {"semantic", "action"} <= set(trace.scores) and len(trace) > 0


def figure(traces: Sequence[Trace]) -> Markup:
    """Draw the figure over unpruned episodes, whose maps are whole: a table of means, and a plot over time for each k.

    Args:
        traces: of the unpruned policy; those without maps are left out.
    """
    looked = [trace for trace in traces if has_maps(trace)]
    if not looked:
        return Markup("")
    total = looked[0].scores["semantic"].shape[1]
    found = {
        share: [overlap(one.scores["semantic"], one.scores["action"], tokens_of(share, total)) for one in looked]
        for share in SHARES
    }
    longest = max(len(trace) for trace in looked)
    plots = [_plot(share, of, longest) for share, of in found.items()]
    legend = element(
        "p",
        element("span", swatch("dot", "semantic"), "semantic with action map"),
        element("span", swatch("square", "action"), "action map with that of the step before"),
        element("span", element("i", class_="key chance"), "two maps that have nothing to do with each other"),
        element("span", "band: the middle 80 % of the episodes") if len(looked) > 2 else Markup(""),
        class_="legend",
    )
    return join([_table(found, len(looked), total), legend, element("div", *plots, class_="plots")], "\n")


def _table(found: dict[float, list[Overlap]], episodes: int, total: int) -> Markup:
    heads = ("k", "semantic with action", "action with step before", "by chance", "OpenVLA's, in the paper")
    rows = []
    for share, of in found.items():
        rows.append(
            element(
                "tr",
                element("th", f"{100 * share:g} % ({tokens_of(share, total)} of {total})", scope="row"),
                element("td", _mean(of, lambda one: one.maps)),
                element("td", _mean(of, lambda one: one.before)),
                element("td", f"{100 * of[0].chance:.0f} %"),
                element("td", "{} %, {} %".format(*_PAPER[share]), class_="soft"),
            )
        )
    caption = f"Overlap of the k highest tokens, mean over control steps and then over {episodes} episodes"
    caption += " (95 % interval over episodes)" if episodes > 1 else ""
    head = element("tr", *(element("th", head, scope="col") for head in heads))
    table = element(
        "table", element("caption", caption, class_="soft"), element("thead", head), element("tbody", *rows)
    )
    return element("div", table, class_="scroll")


def _mean(of: Sequence[Overlap], pick: Callable[[Overlap], np.ndarray]) -> str:
    values = [float(np.nanmean(pick(one))) for one in of if not np.isnan(pick(one)).all()]
    if not values:
        return "-"
    spread: MeanDifference | None = paired_mean_difference([0.0] * len(values), values)
    text = f"{100 * sum(values) / len(values):.0f} %"
    if spread is None:
        return text
    return f"{text} ({100 * max(0.0, spread.low):.0f} to {100 * min(1.0, spread.high):.0f})"


def _plot(share: float, of: list[Overlap], longest: int) -> Markup:
    x = linear_axis(0, max(1, longest - 1), 6)
    plot = Plot(x, Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0)), "control step", "overlap, %", _whole_number, _percent)
    plot.across(of[0].chance, "blank")
    for kind, rows in (("semantic", [one.maps for one in of]), ("action", [one.before for one in of])):
        table = np.full((len(rows), longest), nan)
        for row, values in zip(table, rows, strict=True):
            row[: len(values)] = values
        steps = [step for step in range(longest) if 2 * np.sum(~np.isnan(table[:, step])) >= len(rows)]
        if len(rows) > 2:
            bands = [(step, *np.nanpercentile(table[:, step], _BAND)) for step in steps]
            plot.ribbon([(step, float(low), float(high)) for step, low, high in bands], kind)
        plot.line([(step, float(np.nanmean(table[:, step]))) for step in steps], kind)
    title = f"k = {100 * share:g} % of the tokens"
    return element("figure", element("figcaption", element("b", title)), plot.draw(f"overlap over time, {title}"))


def _whole_number(value: float) -> str:
    return f"{value:g}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"
