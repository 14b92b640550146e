"""The pictures are those that the scripts draw, small, and of the committed run."""

from __future__ import annotations

import json

import pytest

from benchmarks import figure, picture, publish_demo
from tests.docs.pages import DOCS, ROOT


def test_pictures_are_small_and_shown_on_a_page() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*DOCS.rglob("*.md"), ROOT / "README.md")]
    pictures = [path for path in (DOCS / "assets").iterdir() if path.suffix != ".json"]
    assert len(pictures) >= 2
    for path in pictures:
        assert path.stat().st_size < picture.LARGEST
        assert any(f"assets/{path.name})" in text for text in texts), f"no page shows {path.name}"


def test_the_figure_is_what_its_script_draws() -> None:
    assert figure.OUT.read_text(encoding="utf-8") == figure.figure() + "\n"


def test_the_picture_shows_the_times_of_the_committed_run() -> None:
    arms = {arm["arm"]: arm for arm in json.loads(picture.RUN.read_text(encoding="utf-8"))["arms"]}
    shown = json.loads(picture.OUT.with_suffix(".json").read_text(encoding="utf-8"))["milliseconds"]
    assert shown == {key: round(picture._pruned(arms[key])["p50"], 1) for key in picture.SHOWN}, (
        "the demo's run is newer than the picture: python -m benchmarks.picture"
    )


def test_publishing_the_committed_run_again_changes_no_page() -> None:
    table = (publish_demo.RUN / "table.md").read_text(encoding="utf-8")
    other = table.replace("%", "percent")
    for name, lines in (("README.md", publish_demo.HEAD), ("docs/demo.md", None)):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert publish_demo.with_table(text, table, lines) == text
        changed = publish_demo.with_table(text, other, lines)
        assert "\n".join(other.splitlines()[:lines]) in changed
        assert publish_demo.with_table(changed, table, lines) == text
    with pytest.raises(ValueError, match="0 tables"):
        publish_demo.with_table("no table", table)
