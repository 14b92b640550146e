"""The part of the report that needs traces: the player, and the overlap of the two score maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_pruner.evaluation import EvaluationError, Unit
from vla_pruner.evaluation.traces import Trace, read_trace
from vla_pruner.report.films import choose_films, find_traces, read_films
from vla_pruner.report.overlap import figure
from vla_pruner.report.page import source
from vla_pruner.report.results import Results
from vla_pruner.report.svg import Markup, element, join
from vla_pruner.wording import counted


@dataclass(frozen=True)
class Traced:
    """The parts of the page that are made from traces.

    Attributes:
        player, overlap: parts of the page; if nothing was traced the first says how to get traces, and the other is
            empty.
        films: the player's data, plain JSON values.
        damaged: a sentence on each trace that cannot be read; they are left out.
    """

    player: Markup
    overlap: Markup
    films: list[dict[str, Any]]
    damaged: tuple[str, ...] = ()


def look(results: Results, asked: Sequence[str] = ()) -> Traced:
    """Read an evaluation's traces.

    Args:
        asked: episodes that the player shows, see `choose_films`; empty: a few telling ones.

    Raises:
        EvaluationError: none of the traced episodes was asked for.
        ImagesUnavailable: there are traces, and Pillow is not installed.
    """
    paths = find_traces(results)
    if not paths:
        if asked:
            raise EvaluationError(
                f"--episodes is given, but {results.folder} has no traces; give eval --trace 1 first."
            )
        return Traced(_no_traces(), Markup(""), [])
    damaged: list[str] = []
    films = choose_films(results, paths, asked)
    played = read_films(results, paths, films, damaged)
    base = results.summary.baseline.key
    run = results.run.manifest.run
    unpruned = [trace for key, path in paths.items() if key[1] == base for trace in _read(path, key, run, damaged)]
    text = (
        f"{counted(len({unit for unit, _ in paths}), 'traced start')}, of which the page has {len(played.data)}: those "
        "come first that the unpruned policy solved and a pruned arm did not. The semantic score is what the prompt "
        "attends to, the action score what the action tokens attend to; a method knows the action scores of earlier "
        "steps only."
    )
    told = tuple(dict.fromkeys(damaged))
    warnings = [element("p", text, class_="banner") for text in told]
    player = join(
        [element("p", text, class_="soft"), *warnings, Markup(source("player.html")), _note(played.note)], "\n"
    )
    explained = (
        "After figure 2 of arXiv 2511.16449: the share of the k highest tokens of one map that are among the k highest "
        "of the other, in unpruned episodes, where both maps are whole. Where the two maps overlap little, a pruner "
        "that looks at reading alone drops what acting attends to; where the action map overlaps much with that of the "
        "step before, the last steps tell where the next one will look."
    )
    found = figure(unpruned)
    overlap = join([element("p", explained, class_="soft"), found]) if found.text else found
    return Traced(player, overlap, played.data, told)


def _read(path: Path, key: tuple[Unit, str], run: str, damaged: list[str]) -> list[Trace]:
    try:
        return [read_trace(path, key, run)]
    except EvaluationError as error:
        damaged.append(str(error))
        return []


def _note(text: str) -> Markup:
    return element("p", text, class_="soft")


def _no_traces() -> Markup:
    return element(
        "p",
        "No episode was traced, so there are no images and score maps to look at. To get them, give the eval command "
        "again with ",
        element("code", "--trace 1"),
        " and a new --out: the first start of every task is then traced with every arm.",
    )
