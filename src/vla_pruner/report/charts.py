"""Success against the share kept, and against a control step's time: one small plot for each variant of a method.

All plots of a kind have the same axes, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from vla_pruner.evaluation.summary import ArmSummary
from vla_pruner.fate import Fate
from vla_pruner.report.plot import Plot, Point
from vla_pruner.report.results import Results
from vla_pruner.report.svg import Axis, Markup, element, join, linear_axis, log_axis, swatch

UNFOLDED_PLOTS = 9
"""Plots of a kind that are shown at once; the others are folded."""

_LOOKS: dict[str, tuple[str, str]] = {
    Fate.DROP: ("drop", "dot"),
    Fate.FREEZE: ("freeze", "square"),
    Fate.REUSE: ("reuse", "diamond"),
}
_LAYERS = (("dot", ""), ("square", "dash-1"), ("diamond", "dash-2"), ("ring", "dash-3"))
"""Shape and dashes by the layer if there are several; else the shape repeats the colour."""


def keep_plots(results: Results) -> Markup:
    """Plot success against the share of visual tokens kept, with Wilson's intervals and unpruned as a line."""
    shown = {name: [arm for arm in arms if _keep(results, arm)] for name, arms in _variants(results).items()}
    x = log_axis([_keep(results, arm) for arms in shown.values() for arm in arms])
    y = _success_axis(results, _with_controls(results))
    plots = []
    for name, arms in shown.items():
        if not arms:
            continue
        plot = Plot(
            x, y, "visual tokens kept, % (log scale)", "episodes solved, %", _share, _share, width=_width(shown)
        )
        base = results.summary.baseline.success
        plot.across(base.value, "base", "unpruned", (base.low, base.high))
        plot.point(_rated(results.summary.baseline, 1.0, "base", "diamond"))
        _blank_line(results, plot)
        series = _series(results, arms)
        _random_course(results, plot, arms, shift=-5.0 * len(series) / 2 - 2)
        for place, of in enumerate(series.values()):
            shift = 6.0 * (place - (len(series) - 1) / 2)
            kind, shape = _look(results, of)
            plot.line([(_keep(results, arm), arm.success.value) for arm in of], kind, shift)
            for arm in of:
                plot.point(_rated(arm, _keep(results, arm), kind, shape, shift=shift))
        plots.append(_figure(name, plot, series, results, "success against visual tokens kept"))
    return _grid(plots)


def latency_plots(results: Results) -> Markup:
    """Plot success against milliseconds of a control step; other variants in grey behind."""
    shown = {name: [arm for arm in arms if arm.key in results.latency] for name, arms in _variants(results).items()}
    every = [arm for arms in shown.values() for arm in arms]
    base, base_time = results.summary.baseline, results.latency.get(results.summary.baseline.key)
    times = [results.latency[arm.key] for arm in every] + ([base_time] if base_time else [])
    if not every:
        return Markup("")
    values = [value for time in times for value in (time.value, *(time.limits or ()))]
    x = linear_axis(0.0 if min(values) < 0.4 * max(values) else min(values), max(values), 5)
    y = _success_axis(results, [base, *every])
    plots = []
    for name, arms in shown.items():
        if not arms:
            continue
        plot = Plot(x, y, "one control step, milliseconds", "episodes solved, %", _plain, _share, width=_width(shown))
        plot.across(base.success.value, "base", "", (base.success.low, base.success.high))
        if base_time:
            plot.upright(base_time.value, "base")
        for arm in arms:
            plot.keep_clear(results.latency[arm.key].value, arm.success.value)
        mine = {arm.key for arm in arms}
        for arm in every:
            if arm.key not in mine:
                plot.point(Point(results.latency[arm.key].value, arm.success.value, "other"))
        if base_time:
            plot.point(_rated(base, base_time.value, "base", "diamond", limits=base_time.limits, label="unpruned"))
        series = _series(results, arms)
        for of in series.values():
            kind, shape = _look(results, of)
            for arm in of:
                time, keep = results.latency[arm.key], _keep(results, arm)
                label = f"{_share(keep)} %" if keep else ""
                plot.point(_rated(arm, time.value, kind, shape, limits=time.limits, label=label))
        plots.append(_figure(name, plot, series, results, "success against milliseconds"))
    return _grid(plots)


def _variants(results: Results) -> dict[str, list[ArmSummary]]:
    found: dict[str, list[ArmSummary]] = {}
    for group in results.groups.values():
        for arm in group:
            if arm.success.total:
                found.setdefault(results.settings[arm.key].variant, []).append(arm)
    return found


def _series(results: Results, arms: Sequence[ArmSummary]) -> dict[str, list[ArmSummary]]:
    """Return arms by the fate of the other tokens and by layer, each in the order of its `keep`."""
    found: dict[str, list[ArmSummary]] = {}
    for arm in sorted(arms, key=lambda arm: -_keep(results, arm)):
        found.setdefault(results.settings[arm.key].series, []).append(arm)
    return dict(sorted(found.items()))


def _look(results: Results, of: Sequence[ArmSummary]) -> tuple[str, str]:
    """Return the colour by the tokens' fate, and shape and dashes by the layer."""
    setting = results.settings[of[0].key]
    layers = sorted({one.layer for one in results.settings.values()})
    kind, shape = _LOOKS.get(setting.fate, _LOOKS[Fate.DROP])
    if len(layers) == 1:
        return kind, shape
    shape, dash = _LAYERS[layers.index(setting.layer) % len(_LAYERS)]
    return f"{kind} {dash}".strip(), shape


def _rated(
    arm: ArmSummary,
    x: float,
    kind: str,
    shape: str,
    shift: float = 0.0,
    limits: tuple[float, float] | None = None,
    label: str = "",
) -> Point:
    rate = arm.success
    says = f"{arm.title}: {rate.successes} of {rate.total} solved, {_share(rate.value)} % "
    says += (
        f"({_share(rate.low)} to {_share(rate.high)}); {x:.1f} ms"
        if limits
        else f"({_share(rate.low)} to {_share(rate.high)})"
    )
    return Point(x, rate.value, kind, shape, limits, (rate.low, rate.high), label, says, shift)


def _random_course(results: Results, plot: Plot, arms: Sequence[ArmSummary], shift: float) -> None:
    """Draw the random controls of these arms, a line for each fate, layer and warm-up."""
    courses: dict[str, dict[float, ArmSummary]] = {}
    for arm in arms:
        control, keep = results.random_of.get(arm.key), _keep(results, arm)
        if control is not None and control.success.total:
            courses.setdefault(results.settings[arm.key].series, {})[keep] = control
    for name, of in courses.items():
        hollow = "box" if name.startswith(Fate.FREEZE) else "ring"
        ordered = sorted(of.items())
        plot.line([(keep, control.success.value) for keep, control in ordered], "random", shift)
        for keep, control in ordered:
            plot.point(_rated(control, keep, "random", hollow, shift=shift))


def _blank_line(results: Results, plot: Plot) -> None:
    for arm in results.summary.of("blank"):
        if arm.success.total and plot.y.holds(arm.success.value):
            plot.across(arm.success.value, "blank", "blank image")


def _success_axis(results: Results, arms: Sequence[ArmSummary]) -> Axis:
    lows = [arm.success.low for arm in arms if arm.success.total]
    low = min(lows, default=0.0)
    return linear_axis(0.0 if low < 0.45 else low, 1.0, 5)


def _with_controls(results: Results) -> list[ArmSummary]:
    return [arm for arm in results.summary.arms if arm.kind != "blank"]


def _keep(results: Results, arm: ArmSummary) -> float:
    return results.settings[arm.key].keep or 0.0


def _width(shown: dict[str, list[ArmSummary]]) -> int:
    return 400 if len(shown) == 1 else 340


def _figure(name: str, plot: Plot, series: dict[str, list[ArmSummary]], results: Results, what: str) -> Markup:
    items = []
    for label, of in series.items():
        kind, shape = _look(results, of)
        items.append(element("span", swatch(shape, kind), label))
    if what.endswith("kept") and any(arm.key in results.random_of for of in series.values() for arm in of):
        items.append(element("span", swatch("ring", "random"), "random"))
    return element(
        "figure",
        element("figcaption", element("b", name), element("span", *items, class_="legend")),
        plot.draw(f"{name}: {what}"),
    )


def _grid(plots: list[Markup]) -> Markup:
    first = element("div", *plots[:UNFOLDED_PLOTS], class_="plots")
    rest = plots[UNFOLDED_PLOTS:]
    if not rest:
        return first
    more = element("details", element("summary", f"{len(rest)} more"), element("div", *rest, class_="plots"))
    return join([first, more], "\n")


def _share(value: float) -> str:
    return f"{100 * value:.1f}".removesuffix(".0")


def _plain(value: float) -> str:
    return f"{value:g}"
