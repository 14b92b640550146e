"""The package's face on an index and a code host: metadata, README, and the files that they look for."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import vla_pruner as vp
from tests.docs.pages import understood

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    source = (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert f'__version__ = "{vp.__version__}"' in source


def test_the_readme_of_an_index_needs_no_repository() -> None:
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    (path,) = [fragment["path"] for fragment in hook["fragments"]]
    text = (ROOT / path).read_text(encoding="utf-8")
    for one in hook["substitutions"]:
        text = re.sub(one["pattern"], one["replacement"], text)
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []
    assert "![" not in text
    assert "https://arxiv.org/abs/2511.16449" in text
    assert "bench (" not in text
    assert text.count("\n|") == (ROOT / path).read_text(encoding="utf-8").count("\n|")


def test_metadata_says_who_what_and_for_which_pythons() -> None:
    project = PROJECT["project"]
    assert project["authors"] == [{"name": "vla-pruner contributors"}]
    named = {line.rpartition(" ")[2] for line in project["classifiers"] if line.count("::") == 2}
    assert {"3.11", "3.12", "3.13"} <= named
    assert project["requires-python"] == ">=3.11"
    assert "License ::" not in "".join(project["classifiers"])  # the license is an expression


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_names_the_paper() -> None:
    found = _yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    (paper,) = found["references"]
    assert "arxiv.org/abs/2511.16449" in paper["url"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for author in paper["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in readme


def test_the_workflow_calls_what_ci_runs() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    run = {name for group in re.findall(r"^(?:shared|single)=\((.*)\)$", ci, re.MULTILINE) for name in group.split()}
    job = _yaml(".github/workflows/ci.yml")["jobs"]["make"]
    assert set(job["strategy"]["matrix"]["target"]) == run <= targets
    assert {"docs", "test-package"} <= run


@pytest.mark.parametrize("name", ["bug", "family", "method"])
def test_issue_forms_are_forms(name: str) -> None:
    form = _yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids)) >= 3
    for part in form["body"]:
        assert part["type"] in ("input", "textarea", "checkboxes")
        assert part["attributes"]["label"]
    for linked in re.findall(r"docs/[\w-]+\.md", json.dumps(form)):
        assert (ROOT / linked).is_file()


def test_what_runs_before_a_commit_is_what_make_check_runs() -> None:
    check = re.search(r"^check: install\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert check is not None
    tools = set(re.findall(r"\$\(VENV\)/bin/(\w+)", check[1]))
    (repo,) = _yaml(".pre-commit-config.yaml")["repos"]
    assert {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repo["hooks"]} == tools


def test_the_container_s_command_is_understood() -> None:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    words = [json.loads(re.search(rf"^{word} (\[.*\])$", text, re.MULTILINE)[1]) for word in ("ENTRYPOINT", "CMD")]  # pyright: ignore[reportOptionalSubscript]
    understood(shlex.join([*words[0], *words[1]]))
    (extras,) = re.findall(r"pip install .*'\.\[([\w,-]+)\]'", text)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / one).exists() for one in copied.split())
    assert "has not been built" in text
