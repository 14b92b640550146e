"""Overlaps, axes and settings by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.report.folders import write_run
from vla_pruner.cli import main
from vla_pruner.evaluation.verdict import points
from vla_pruner.report.overlap import overlap, tokens_of, top_tokens
from vla_pruner.report.plot import Plot, Point
from vla_pruner.report.results import read_results
from vla_pruner.report.svg import Mark, element, linear_axis, log_axis, strip


def test_overlap_counts_shared_tokens() -> None:
    semantic = np.array([[9, 8, 1, 0], [9, 8, 1, 0], [0, 1, 8, 9], [9, 8, 1, 0]], np.float32)
    action = np.array([[9, 0, 8, 1], [0, 9, 8, 1], [0, 1, 8, 9], [np.nan] * 4], np.float32)
    found = overlap(semantic, action, 2)
    np.testing.assert_allclose(found.maps, [0.5, 0.5, 1.0, np.nan])
    np.testing.assert_allclose(found.before, [np.nan, 0.5, 0.5, np.nan])
    assert found.chance == 0.5


def test_maps_of_noise_overlap_by_chance() -> None:
    generator = np.random.default_rng(0)
    found = overlap(generator.random((400, 64)), generator.random((400, 64)), 16)
    assert found.maps.mean() == pytest.approx(0.25, abs=0.02)
    assert np.nanmean(found.before) == pytest.approx(found.chance, abs=0.02)


def test_equal_scores_go_to_the_smaller_id() -> None:
    np.testing.assert_array_equal(top_tokens(np.ones((1, 4)), 2), [[True, True, False, False]])


def test_k_is_a_share_of_the_tokens() -> None:
    assert [tokens_of(share, 196) for share in (0.5, 0.25, 0.125)] == [98, 49, 24]
    assert tokens_of(0.001, 196) == 1


def test_axes_have_round_ticks_and_hold_what_they_are_asked_to() -> None:
    axis = linear_axis(-0.37, 0.12, 7)
    assert axis.ticks == (-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2)
    assert axis.place(-0.4) == 0.0
    assert axis.place(-0.1) == pytest.approx(0.5)
    assert axis.place(-3.0) == 0.0
    assert linear_axis(1.0, 1.0).holds(1.0)
    logarithmic = log_axis([24 / 196, 0.5])
    assert logarithmic.ticks == (0.125, 0.25, 0.5, 1.0)
    steps = [logarithmic.place(tick) for tick in logarithmic.ticks]
    np.testing.assert_allclose(np.diff(steps), np.diff(steps)[0])
    assert logarithmic.place(24 / 196) > 0


def test_text_is_escaped_wherever_it_comes_from() -> None:
    made = str(element("p", "<b>", element("i", "&"), title='"x"', class_="a", data_v=1.0, hidden=None))
    assert made == '<p title="&quot;x&quot;" class="a" data-v="1">&lt;b&gt;<i>&amp;</i></p>'


def test_an_interval_that_leaves_the_axis_has_an_arrow() -> None:
    axis = linear_axis(-0.5, 0.5)
    inside = str(strip(axis, [Mark(0.0, -0.1, 0.1, "good")], 0.02))
    outside = str(strip(axis, [Mark(-0.7, -0.9, 0.1, "good")], 0.02))
    assert "beyond" not in inside
    assert inside.count("mark dot") == 1
    assert outside.count("beyond") == 1
    assert "mark dot" not in outside, "a value that is not on the axis is not drawn at its end"


def test_labels_keep_apart() -> None:
    axis = linear_axis(0, 1)
    plot = Plot(axis, axis, "x", "y", str, str)
    for _ in range(6):
        plot.point(Point(0.5, 0.5, "drop", label="25 %"))
    assert str(plot.draw("")).count("25 %") == 4


def test_titles_are_read(tmp_path) -> None:
    write_run(tmp_path / "run", methods=("vla-pruner:unseen=carry:window=5",), keep=(0.25,), pruned=("freeze",))
    (setting,) = read_results(tmp_path / "run").settings.values()
    assert setting.method == "vla-pruner"
    assert setting.options == ("unseen=carry", "window=5", "semantic_queries=last")
    assert setting.series == "freeze, K=3"
    assert setting.keep == pytest.approx(49 / 196)


def test_the_interval_is_the_one_that_was_asked_for(tmp_path) -> None:
    write_run(tmp_path / "run", keep=(0.25,), pruned=("drop",))
    pages = []
    for words in ([], ["--interval", "tango"]):
        assert main(["report", str(tmp_path / "run"), *words]) == 0
        pages.append((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "interval for pairs, tasks as strata. +/-" in pages[0]
    assert "score interval for pairs, all tasks as one" in pages[1]
    difference = read_results(tmp_path / "run", "tango").methods[0].difference
    assert difference is not None
    shown = f"{points(difference.low)} to {points(difference.high)}"
    assert shown in pages[1]
    assert shown not in pages[0]


def test_the_median_milliseconds_are_those_of_the_episodes(tmp_path) -> None:
    write_run(tmp_path / "run", outcome=lambda arm, unit: None if unit.initial_state < 5 else True)
    results = read_results(tmp_path / "run")
    done = [record for record in results.run.records.values() if record.unit.initial_state >= 5]
    for key, latency in results.latency.items():
        medians = sorted(record.latency_p50_ms or 0.0 for record in done if record.arm == key)
        assert latency.value == pytest.approx(np.median(medians))
        assert latency.limits is not None
        assert latency.limits[0] <= latency.value <= latency.limits[1]
