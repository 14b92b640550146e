"""The end of the report: how to read it, its conditions, and the episodes that crashed."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from vla_pruner.evaluation import table
from vla_pruner.report.results import Results
from vla_pruner.report.svg import Markup, element, join
from vla_pruner.wording import counted

_MOST_CRASHES = 50

_VERDICTS = (
    "Verdicts: not worse where a loss of the margin or more is ruled out, worse where a larger loss is shown, else "
    "inconclusive; one-sided at 2.5 %, by Holm over all methods, so with many arms a verdict asks for more than the "
    "95 % interval beside it. Inconclusive is a result: few episodes cannot show that nothing was lost."
)
_PLOTS = (
    "Plots: bars are 95 % intervals, Wilson's for rates; of milliseconds, the median episode's median and its exact "
    "interval over episodes. Intervals speak of these tasks and of new initial states, not of new tasks.",
    "Do not choose the best of many arms here and claim its figure: run it again on other initial states (--first).",
)


def notes(results: Results) -> Markup:
    """Return the part on how to read the page."""
    return element("ul", *(element("li", note) for note in (_VERDICTS, *table.notes(results.summary), *_PLOTS)))


def conditions(results: Results) -> Markup:
    """Return the part on settings, machines and versions."""
    manifest = results.run.manifest
    facts: dict[str, Any] = {
        "folder": results.folder.resolve().name,
        "run": manifest.run,
        "policy": results.policy,
        "weights": manifest.identity.get("weights"),
        "commands": list(dict.fromkeys(one.get("command") for one in results.conditions if one.get("command"))),
        "machines": list(dict.fromkeys(_machine(one) for one in results.conditions)),
        "source tree": list(dict.fromkeys(one.get("git") for one in results.conditions if one.get("git"))),
        "versions": [f"{suite}: {versions}" for suite, versions in _versions(results).items()],
    }
    rows = []
    for name, value in facts.items():
        values = value if isinstance(value, list) else [value]
        texts = [element("div", str(one)) for one in values if one] or [element("div", "unknown")]
        rows.append(join([element("dt", name), element("dd", *texts)]))
    settings = json.dumps(manifest.identity, indent=1)
    raw = element("details", element("summary", "All settings"), element("pre", settings))
    return join([element("dl", *rows, class_="facts"), raw])


def _machine(one: Any) -> str:
    parts = (one.get("processor", "unknown processor"), counted(one.get("threads") or 0, "thread"), one.get("platform"))
    return ", ".join(str(part) for part in parts if part)


def _versions(results: Results) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in results.finished:
        if record.versions and record.unit.suite not in found:
            found[record.unit.suite] = ", ".join(f"{name} {value}" for name, value in record.versions.items() if value)
    return found


def crashes(results: Results) -> Markup:
    """Return the part on episodes that crashed, the same message once; empty if there is none."""
    crashed = [record for record in results.run.records.values() if record.crashed]
    if not crashed:
        return Markup("")
    told: Counter[str] = Counter()
    first: dict[str, str] = {}
    for record in crashed:
        error = record.error or {}
        text = f"{error.get('type', 'unknown')}: {error.get('message', '')}"
        told[text] += 1
        first.setdefault(text, f"first {record.arm} on {record.unit}; {error.get('where', '')}")
    items = [
        element("li", element("b", f"{count} x "), text, element("small", first[text]))
        for text, count in told.most_common(_MOST_CRASHES)
    ]
    title = f"{counted(len(crashed), 'episode')} crashed"
    return element("details", element("summary", title), element("ul", *items))
