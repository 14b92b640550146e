"""The figure of a control step in README.md and docs/how-it-works.md.

python -m benchmarks.figure      # writes docs/assets/control-step.svg
"""

from __future__ import annotations

from pathlib import Path

from vla_pruner.report.svg import Markup, element, join

OUT = Path(__file__).parents[1] / "docs" / "assets" / "control-step.svg"
WIDTH, HEIGHT = 900, 322
INK, SOFT = "#1c2330", "#5b6676"
VISUAL, WORDS, FROZEN = ("#9db7e8", "#2f6fde"), ("#d5dae3", "#7a8ca8"), ("#ffffff", "#2f6fde")
SAYS = (
    "All tokens pass the first layers. Before layer K the method chooses which visual tokens stay, by two scores. The "
    "others are dropped, or frozen: their keys and values stay readable. The kept tokens pass the remaining layers and "
    "the action comes out. What it attended to is remembered for the next steps."
)


def figure() -> str:
    """The SVG, as text."""
    kept = [VISUAL] * 2 + [WORDS] * 3
    layers = {"fill": "#f2f5fa", "stroke": "#7a8ca8", "rx": 6}
    parts = [
        element("title", "One control step, pruned"),
        element("desc", SAYS),
        element("defs", _arrow_head()),
        element("rect", width=WIDTH, height=HEIGHT, rx=8, fill="#ffffff"),
        _text(62, 34, "cameras, words", bold=True),
        *_column(49, 48, [VISUAL] * 8 + [WORDS] * 3),
        _text(62, 264, "visual tokens", soft=True),
        _text(62, 280, "and text", soft=True),
        _path("M84 145L128 145"),
        element("rect", x=134, y=48, width=120, height=196, **layers),
        _text(194, 34, "layers 0 to K-1", bold=True),
        _text(194, 140, "everything"),
        _text(194, 158, "is computed"),
        _path("M258 145L290 145"),
        element("rect", x=296, y=78, width=164, height=136, rx=6, fill="#fdf1e6", stroke="#e0853a"),
        _text(378, 64, "choose k visual tokens", bold=True),
        _text(378, 106, "what the prompt reads"),
        _text(378, 124, "and what the last"),
        _text(378, 142, "actions read,"),
        _text(378, 170, "thinned, so that they", soft=True),
        _text(378, 186, "differ from each other", soft=True),
        _path("M460 120C482 120 482 92 502 92"),
        _text(520, 34, "drop", bold=True),
        *_column(507, 48, kept),
        _path("M460 172C482 172 482 222 502 222"),
        _text(520, 166, "freeze", bold=True),
        *_column(507, 178, kept),
        *_column(541, 178, [FROZEN] * 6, width=18, height=12),
        _text(566, 214, "keys and", soft=True, anchor="start"),
        _text(566, 230, "values only", soft=True, anchor="start"),
        _path("M540 92L684 120"),
        _path("M644 222L684 190"),
        element("rect", x=690, y=78, width=120, height=136, **layers),
        _text(750, 64, "layers K to the last", bold=True),
        _text(750, 140, "few tokens"),
        _text(750, 158, "are computed"),
        _path("M814 145L842 145"),
        _text(868, 149, "action", bold=True),
        _path("M868 162V300H378V220", dashes="5 4"),
        _text(624, 292, "what the action attended to: remembered for the next steps of the episode", soft=True),
    ]
    return str(
        element(
            "svg",
            join(parts, "\n"),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            font_family="system-ui, sans-serif",
        )
    )


def _column(x: int, y: int, cells: list[tuple[str, str]], width: int = 26, height: int = 15) -> list[Markup]:
    """Tokens, one below the other: (fill, stroke) each."""
    return [
        element("rect", x=x, y=y + index * (height + 3), width=width, height=height, rx=2, fill=fill, stroke=stroke)
        for index, (fill, stroke) in enumerate(cells)
    ]


def _text(x: int, y: int, text: str, *, bold: bool = False, soft: bool = False, anchor: str = "middle") -> Markup:
    size, weight = (12 if soft else 13), (600 if bold else 400)
    fill = SOFT if soft else INK
    return element("text", text, x=x, y=y, text_anchor=anchor, font_size=size, font_weight=weight, fill=fill)


def _path(d: str, dashes: str | None = None) -> Markup:
    return element(
        "path", d=d, stroke=SOFT, stroke_width=1.5, fill="none", stroke_dasharray=dashes, marker_end="url(#head)"
    )


def _arrow_head() -> Markup:
    head = element("path", d="M0 0L8 4L0 8z", fill=SOFT)
    return element(
        "marker", head, id="head", viewBox="0 0 8 8", refX=7, refY=4, markerWidth=7, markerHeight=7, orient="auto"
    )


def main() -> None:
    OUT.write_text(figure() + "\n", encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
