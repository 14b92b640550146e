"""Small pieces of SVG and HTML: elements with every text escaped, axes with round ticks, marks with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from math import ceil, floor, log2, log10


@dataclass(frozen=True)
class Markup:
    """Text that is markup already; every other text is escaped."""

    text: str

    def __str__(self) -> str:
        return self.text


def element(tag: str, *children: Markup | str, **attributes: object) -> Markup:
    """Return <tag attributes>children</tag>.

    Args:
        children: escaped, unless they are `Markup`.
        attributes: "data_v" is written data-v and "class_" class; None leaves one out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inside = "".join(str(child) if isinstance(child, Markup) else escape(child) for child in children)
    return Markup(f"<{tag}{written}>{inside}</{tag}>")


def join(parts: list[Markup], between: str = "") -> Markup:
    """Return the parts one after the other."""
    return Markup(between.join(map(str, parts)))


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Axis:
    """Values along a line.

    Attributes:
        low, high: its ends.
        ticks: round values between them.
        is_log: whether doubling is a fixed distance.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return 0 at the low end, 1 at the high end; values outside are put at the end."""
        if self.is_log:
            share = log2(max(value, 1e-9) / self.low) / log2(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def holds(self, value: float) -> bool:
        """Return True if a value is between the ends."""
        return self.low <= value <= self.high


def linear_axis(low: float, high: float, most: int = 6) -> Axis:
    """Return an axis from at most `low` to at least `high`, with at most about `most` round ticks at its ends and
    between.
    """
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / most
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    ticks = tuple(round(number * step, 10) for number in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(values: list[float]) -> Axis:
    """Return an axis of shares up to 1, a tick at every halving, that ends a bit below the least of `values`."""
    least = min([value for value in values if value > 0], default=0.5)
    count = max(1, ceil(log2(1 / least) - 0.15))  # 24 of 196 tokens are .122 and belong to .125
    return Axis(min(1 / 2**count, least) / 1.3, 1.15, tuple(1 / 2**n for n in range(count, -1, -1)), True)


@dataclass(frozen=True)
class Mark:
    """A value with its interval.

    Attributes:
        kind: its look, a class of the style sheet.
        shape: "dot", "square", "diamond", or hollow: "ring", "box".
        says: the text that a pointer shows.
    """

    value: float
    low: float
    high: float
    kind: str
    shape: str = "dot"
    says: str = ""


_PATHS = {
    "dot": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "ring": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-4-4h8v8h-8z",
    "box": "M-3.6-3.6h7.2v7.2h-7.2z",
    "diamond": "M0-5.2L5.2 0L0 5.2L-5.2 0z",
}


def symbol(shape: str, kind: str, **attributes: object) -> Markup:
    """Return a mark's shape around the origin."""
    return element("path", d=_PATHS[shape], class_=f"mark {shape} {kind}", **attributes)


def swatch(shape: str, kind: str) -> Markup:
    """Return a shape for a legend."""
    return element("svg", symbol(shape, kind), class_="swatch", viewBox="-7 -7 14 14", aria_hidden="true")


def strip(axis: Axis, marks: list[Mark], margin: float | None = None, apart: bool = True) -> Markup:
    """Return one row of a forest plot, as wide as there is room: places are percentages, so nothing is distorted.

    Args:
        axis: of differences.
        margin: the loss that counts, as a fraction; the area beyond it is shaded.
        apart: whether each mark has a height of its own.
    """
    parts = [_rule(axis, 0.0, "zero")]
    if margin is not None:
        parts.insert(0, element("rect", x=0, y=0, width=_percent(axis, -margin), height="100%", class_="loss"))
        parts.append(_rule(axis, -margin, "margin"))
    for index, mark in enumerate(marks):
        y = f"{100 * (index + 1) / (len(marks) + 1):.0f}%" if apart else "50%"
        ends = [
            element("line", x1=_percent(axis, mark.low), x2=_percent(axis, mark.high), y1=y, y2=y, class_="whisker")
        ]
        if mark.low < axis.low:
            ends.append(_at("0", y, element("path", d="M7-4L1 0L7 4", class_="beyond")))
        if mark.high > axis.high:
            ends.append(_at("100%", y, element("path", d="M-7-4L-1 0L-7 4", class_="beyond")))
        shape = Markup("") if not axis.holds(mark.value) else _at(_percent(axis, mark.value), y, symbol(mark.shape, ""))
        title = element("title", mark.says) if mark.says else Markup("")
        parts.append(element("g", title, *ends, shape, class_=mark.kind))
    said = "; ".join(mark.says for mark in marks)
    return element("span", element("svg", *parts, class_="strip", role="img", aria_label=said), class_="cell")


def strip_axis(axis: Axis, unit: str) -> Markup:
    """Return the ticks above the rows of a forest plot, in percentage points."""
    parts = []
    for tick in axis.ticks:
        text = f"{100 * tick:+g}" if tick else "0"
        parts.append(element("text", text, x=_percent(axis, tick), y=12, text_anchor="middle"))
        parts.append(element("line", x1=_percent(axis, tick), x2=_percent(axis, tick), y1=16, y2=21, class_="tick"))
    return element("span", element("svg", *parts, class_="strip", role="img", aria_label=unit), class_="cell axis")


def _percent(axis: Axis, value: float) -> str:
    return f"{100 * axis.place(value):.2f}%"


def _rule(axis: Axis, value: float, kind: str) -> Markup:
    x = _percent(axis, value)
    return element("line", x1=x, x2=x, y1=0, y2="100%", class_=kind)


def _at(x: str, y: str, child: Markup) -> Markup:
    return element("svg", child, x=x, y=y, overflow="visible")
