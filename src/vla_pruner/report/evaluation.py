"""The report of an evaluation: one HTML file that needs nothing else."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape

from vla_pruner.report.charts import keep_plots, latency_plots
from vla_pruner.report.controls import controls
from vla_pruner.report.notes import conditions, crashes, notes
from vla_pruner.report.page import fill, script_json, source
from vla_pruner.report.results import Results
from vla_pruner.report.svg import Markup, element, join
from vla_pruner.report.tables import arms_table, suites_table
from vla_pruner.report.tasks import task_forests
from vla_pruner.report.traced import Traced
from vla_pruner.report.verdicts import UNFOLDED, banners, headline, overview, question, tiles

_OFFLINE = "Nothing is loaded from elsewhere."
_FILTERED = 20
"""Arms from which the table can be filtered."""


def render(results: Results, traced: Traced) -> str:
    """Return the page as text.

    Args:
        traced: of `look`.
    """
    sections = [
        ("arms", "All arms", _table(results)),
        (
            "keep",
            "Success against what is kept",
            _explained(
                keep_plots(results),
                "Each point is an arm; bars are 95 % intervals of its rate (unpaired: the verdicts above use pairs and "
                "see smaller differences). The line is the unpruned policy with its interval.",
            ),
        ),
        (
            "latency",
            "Success against latency",
            _explained(
                latency_plots(results),
                "Up and to the left of the unpruned policy's lines is better. Labels: visual tokens kept. Grey: the "
                "other variants. Milliseconds of one control step, all steps of an episode, pruned or not.",
            ),
        ),
        (
            "tasks",
            "Task by task",
            _explained(
                task_forests(results),
                "Differences to the unpruned policy on the same episodes, with 95 % intervals. One task has few pairs: "
                "most of these intervals are wide, and with many tasks a few exclude zero by chance.",
            ),
        ),
        ("films", "What was pruned, and where the policy looks", traced.player),
        ("overlap", "Do reading and acting look at the same tokens?", traced.overlap),
    ]
    shown = [(name, title, body) for name, title, body in sections if body.text]
    links = [("verdict", "Verdict"), *((name, title) for name, title, _ in shown)]
    nav = join([element("a", title, href=f"#{name}") for name, title in links], "\n")
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return fill(
        "evaluation.html",
        title=escape(f"{results.policy}: vla-pruner report"),
        style=source("base.css") + source("evaluation.css"),
        eyebrow=escape(f"{results.policy} on {', '.join(results.suites)}"),
        headline=escape(headline(results)),
        question=escape(question(results)),
        banners=banners(results),
        nav=nav,
        tiles=tiles(results),
        overview=_overview(results),
        controls=controls(results),
        sections="\n".join(str(element("section", element("h2", title), body, id=name)) for name, title, body in shown),
        notes=notes(results),
        conditions=conditions(results),
        crashes=crashes(results),
        footer=escape(f"Made by vla-pruner report on {made} from {results.folder.resolve().name}/. {_OFFLINE}"),
        films=script_json(traced.films),
        script=source("evaluation.js") + source("player.js"),
    )


def _explained(body: Markup, text: str) -> Markup:
    return join([element("p", text, class_="soft"), body], "\n") if body.text else body


def _overview(results: Results) -> Markup:
    body = overview(results)
    if len(results.methods) <= UNFOLDED or len(results.groups) < 2:
        return body
    button = element("button", "Unfold all", type="button", id="unfold")
    return join([element("p", button, class_="controls for-script"), body], "\n")


def _table(results: Results) -> Markup:
    tools = []
    if len(results.groups) > 1:
        box = element("input", type="checkbox", id="grouped", checked="")
        tools.append(element("label", box, " by method"))
    if len(results.summary.arms) >= _FILTERED:
        tools.append(
            element("input", type="search", id="filter", placeholder="show arms with ...", aria_label="filter")
        )
    hint = "A click on a head sorts."
    return join(
        [
            element("p", element("span", hint, class_="soft"), *tools, class_="controls for-script"),
            element("div", arms_table(results), class_="table-box"),
            suites_table(results),
        ],
        "\n",
    )
