"""A small plot with two labelled axes: points with intervals in both directions, lines, reference lines and bands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vla_pruner.report.svg import Axis, Markup, element, symbol

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 44


@dataclass(frozen=True)
class Point:
    """A point of a plot.

    Attributes:
        x_limits, y_limits: its intervals; None: none.
        label: written beside it.
        says: the text that a pointer shows.
    """

    x: float
    y: float
    kind: str
    shape: str = "dot"
    x_limits: tuple[float, float] | None = None
    y_limits: tuple[float, float] | None = None
    label: str = ""
    says: str = ""
    shift: float = 0.0
    """The shift to the right, in pixels, so that points of the same x stay apart."""


@dataclass
class Plot:
    """A plot that grows as things are added to it, from the back to the front.

    Args:
        x, y: its axes.
        x_title, y_title: with the unit.
        write_x, write_y: write a tick's text.
        width, height: in pixels, before the page scales it.
    """

    x: Axis
    y: Axis
    x_title: str
    y_title: str
    write_x: Callable[[float], str]
    write_y: Callable[[float], str]
    width: int = 340
    height: int = 250
    _parts: list[Markup] = field(default_factory=list)
    _labels: list[tuple[float, float, float, float]] = field(default_factory=list)

    def px(self, value: float) -> float:
        """Return the place of a value of x, in pixels."""
        return _LEFT + (self.width - _LEFT - _RIGHT) * self.x.place(value)

    def py(self, value: float) -> float:
        """Return the place of a value of y, in pixels."""
        return self.height - _BOTTOM - (self.height - _TOP - _BOTTOM) * self.y.place(value)

    def across(self, value: float, kind: str, label: str = "", limits: tuple[float, float] | None = None) -> None:
        """Add a reference line from left to right, with its interval as a band and a label above its left end."""
        right = self.width - _RIGHT
        if limits is not None:
            top, bottom = self.py(limits[1]), self.py(limits[0])
            self._add("rect", x=_LEFT, y=top, width=right - _LEFT, height=max(0.5, bottom - top), class_=f"band {kind}")
        y = self.py(value)
        self._add("line", x1=_LEFT, x2=right, y1=y, y2=y, class_=f"reference {kind}")
        if label:
            above = y - 5 if y > _TOP + 12 else y + 13
            self._parts.append(element("text", label, x=_LEFT + 4, y=above, class_=f"label halo {kind}"))

    def upright(self, value: float, kind: str) -> None:
        """Add a reference line from bottom to top."""
        x = self.px(value)
        self._add("line", x1=x, x2=x, y1=_TOP, y2=self.height - _BOTTOM, class_=f"reference {kind}")

    def line(self, points: Sequence[tuple[float, float]], kind: str, shift: float = 0.0) -> None:
        """Add a line through points."""
        if len(points) > 1:
            path = "M" + "L".join(f"{self.px(x) + shift:.1f} {self.py(y):.1f}" for x, y in points)
            self._add("path", d=path, class_=f"course {kind}")

    def ribbon(self, points: Sequence[tuple[float, float, float]], kind: str) -> None:
        """Add the area between low and high of (x, low, high)."""
        if len(points) > 1:
            there = [f"{self.px(x):.1f} {self.py(high):.1f}" for x, _, high in points]
            back = [f"{self.px(x):.1f} {self.py(low):.1f}" for x, low, _ in reversed(points)]
            self._add("path", d="M" + "L".join([*there, *back]) + "z", class_=f"ribbon {kind}")

    def point(self, point: Point) -> None:
        """Add a point with its intervals."""
        x, y = self.px(point.x) + point.shift, self.py(point.y)
        parts = [element("title", point.says)] if point.says else []
        if point.y_limits is not None:
            low, high = (self.py(limit) for limit in point.y_limits)
            parts.append(element("line", x1=x, x2=x, y1=low, y2=high, class_="whisker"))
        if point.x_limits is not None:
            low, high = (self.px(limit) for limit in point.x_limits)
            parts.append(element("line", x1=low, x2=high, y1=y, y2=y, class_="whisker"))
        parts.append(element("g", symbol(point.shape, ""), transform=f"translate({x:.1f} {y:.1f})"))
        if point.label:
            parts += self._label(point.label, x, y)
        self._parts.append(element("g", *parts, class_=f"point {point.kind}"))

    def keep_clear(self, x: float, y: float) -> None:
        """Keep labels away from this point."""
        self._labels.append((self.px(x) - 5, self.py(y) - 5, 10.0, 10.0))

    def _label(self, text: str, x: float, y: float) -> list[Markup]:
        """Write a text beside a point if one of four places is free; else write none."""
        wide = 6.2 * len(text) + 4
        for left, below in ((False, False), (True, False), (False, True), (True, True)):
            box = (x - 6 - wide if left else x + 6, y + 3 if below else y - 18, wide, 15.0)
            inside = box[0] >= _LEFT and box[0] + wide <= self.width and box[1] >= 0
            if inside and not any(_overlapping(box, other) for other in self._labels):
                self._labels.append(box)
                at, anchor = (x - 7, "end") if left else (x + 7, "start")
                baseline = y + 15 if below else y - 6
                return [element("text", text, x=at, y=baseline, text_anchor=anchor, class_="label halo")]
        return []

    def draw(self, title: str) -> Markup:
        """Return the whole plot; `title` is read by screen readers."""
        return element(
            "svg",
            *self._grid(),
            *self._parts,
            class_="plot",
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_label=title,
        )

    def _grid(self) -> list[Markup]:
        bottom, right = self.height - _BOTTOM, self.width - _RIGHT
        parts = []
        for tick in self.y.ticks:
            y = self.py(tick)
            parts.append(element("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid"))
            parts.append(element("text", self.write_y(tick), x=_LEFT - 7, y=y + 4, text_anchor="end", class_="tick"))
        for tick in self.x.ticks:
            x = self.px(tick)
            parts.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="grid strong"))
            parts.append(element("text", self.write_x(tick), x=x, y=bottom + 17, text_anchor="middle", class_="tick"))
        parts.append(element("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="grid strong"))
        middle = (_TOP + bottom) / 2
        parts.append(
            element(
                "text", self.x_title, x=(_LEFT + right) / 2, y=self.height - 8, text_anchor="middle", class_="title"
            )
        )
        turned = f"translate(13 {middle:.1f}) rotate(-90)"
        parts.append(element("text", self.y_title, transform=turned, text_anchor="middle", class_="title"))
        return parts

    def _add(self, tag: str, **attributes: object) -> None:
        self._parts.append(element(tag, **attributes))


def _overlapping(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))
