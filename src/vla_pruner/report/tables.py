"""The table of all arms, by method, with a number in every cell to sort by; and the results of each suite."""

from __future__ import annotations

from math import isnan

from vla_pruner.evaluation.summary import ArmSummary
from vla_pruner.evaluation.table import COSTS, OUTCOMES, cost_rows, outcome_rows, suite_table
from vla_pruner.evaluation.verdict import points
from vla_pruner.report.results import Results
from vla_pruner.report.svg import Markup, element
from vla_pruner.report.verdicts import KINDS, SIGNS

_RANDOM = "against random"
_COST_HEADS = {"difference": "more steps", "p50 ms": "ms, p50", "p99 ms": "ms, p99"}
HEADS = (*OUTCOMES[:-1], OUTCOMES[-1], _RANDOM, *(_COST_HEADS.get(head, head) for head in COSTS[1:]))
_VERDICT = len(OUTCOMES) - 1


def arms_table(results: Results) -> Markup:
    """Return one row an arm: a body for the unpruned policy, each method, and the controls."""
    arms = results.summary.arms
    texts = {
        arm.key: (*outcome, _against_random(arm), *cost[1:])
        for arm, outcome, cost in zip(arms, outcome_rows(results.summary), cost_rows(results.summary), strict=True)
    }
    controls = [arm for arm in arms if arm.kind not in ("baseline", "method")]
    bodies = [_body("", [results.summary.baseline], texts)]
    bodies += [_body(method, group, texts) for method, group in results.groups.items()]
    if controls:
        bodies.append(_body("controls", controls, texts))
    heads = [
        element(
            "th",
            element("button", head.replace(" ", "\u00a0") if "%" in head else head, type="button"),
            data_column=place,
            scope="col",
            aria_sort="none",
        )
        for place, head in enumerate(HEADS)
    ]
    return element("table", element("thead", element("tr", *heads)), *bodies, class_="arms", id="arms-table")


def _body(title: str, arms: list[ArmSummary], texts: dict[str, tuple[str, ...]]) -> Markup:
    rows = [
        element("tr", *_cells(arm, texts[arm.key]), data_arm=arm.key, class_="base" if arm.kind == "baseline" else None)
        for arm in arms
    ]
    if title:
        name = element(
            "button", title, element("span", f" {len(arms)}", class_="soft"), type="button", aria_expanded="true"
        )
        rows.insert(0, element("tr", element("th", name, colspan=len(HEADS), scope="rowgroup"), class_="section"))
    return element("tbody", *rows, data_group=title or None)


def _cells(arm: ArmSummary, texts: tuple[str, ...]) -> list[Markup]:
    cells = []
    for place, (text, value) in enumerate(zip(texts, _values(arm), strict=True)):
        tag = "td" if place else "th"
        attributes = {"data_v": None if value is None or isnan(value) else f"{value:.6g}"}
        if place == _VERDICT and arm.verdict is not None:
            word = arm.verdict.word
            badge = element("span", f"{SIGNS[word]} {word}", class_=f"badge {KINDS[word]}")
            cells.append(element(tag, badge, **attributes))
            continue
        first, _, below = text.partition("\n")
        under = element("small", below) if below else Markup("")
        cells.append(element(tag, first, under, scope=None if place else "row", **attributes))
    return cells


def _values(arm: ArmSummary) -> list[float | None]:
    """Return the values that a click on a head sorts by, one for each of `HEADS`; None: by the text."""
    d, verdict, slower, rate = arm.difference, arm.verdict, arm.slower, arm.success.value
    random = arm.against_random
    has = d is not None and d.pairs > 0
    return [
        None,
        rate,
        rate,
        d.value if has and d else None,
        float(d.gained - d.lost) if has and d else None,
        (d.p_value if arm.p_adjusted is None else arm.p_adjusted) if has and d else None,
        None if verdict is None else float(list(KINDS).index(verdict.word)),
        random.value if random is not None and random.pairs else None,
        arm.median_steps,
        None if slower is None else slower.value,
        arm.latency_p50_ms,
        arm.latency_p99_ms,
        float(sum(arm.kept)) if arm.kept else None,
        arm.pruned_share if arm.success.total else None,
        float(arm.crashed),
    ]


def _against_random(arm: ArmSummary) -> str:
    one = arm.against_random
    if one is None or not one.pairs:
        return "-"
    return f"{points(one.value)}\n{points(one.low)} to {points(one.high)}"


def suites_table(results: Results) -> Markup:
    """Return each arm's success by suite; empty if there is but one."""
    heads, rows = suite_table(results.summary)
    if not rows:
        return Markup("")
    head = element("tr", *(element("th", text, scope="col") for text in heads))
    body = [
        element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells))
        for name, *cells in rows
    ]
    table = element("table", element("thead", head), element("tbody", *body), class_="arms")
    return element("details", element("summary", "By suite"), element("div", table, class_="scroll"))
