"""One range of transformers: the package's check, its messages, and pip's requirement agree."""

from __future__ import annotations

import re
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vla_pruner as vp
from tests.attach.tiny import VISUAL, tiny_lm
from vla_pruner.caches import NAMES, cache_in, cache_name, cache_of
from vla_pruner.policies.pi0 import load_pi0
from vla_pruner.versions import INSTALL, NEWEST, OLDEST, transformers_problem

ROOT = Path(__file__).parents[1]


def test_pip_installs_what_is_accepted() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = [each for each in project["dependencies"] if each.startswith("transformers")]
    assert f"pip install '{requirement}'" == INSTALL
    oldest = (ROOT / "constraints/oldest.txt").read_text(encoding="utf-8")
    assert "transformers=={}.{}.".format(*OLDEST) in oldest


@pytest.mark.parametrize("name", ["README.md", "docs/openvla.md", "CHANGELOG.md"])
def test_documents_name_the_same_range(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "{}.{} to {}.{}".format(*OLDEST, *NEWEST) in text
    assert not re.search(r"newest 5\.x|5\.4 to 5\.x", text)


def test_what_was_tested_is_accepted() -> None:
    for version in ("5.4.0", "5.4.0.dev0", "5.23.1", "{}.{}.7".format(*NEWEST), transformers.__version__):
        assert transformers_problem(version) is None, version


@pytest.mark.parametrize("version", ["4.57.6", "5.3.0", "5.25.0", "5.25rc1", "6.0.0", "unknown"])
def test_what_was_not_tested_is_refused_where_a_policy_is_loaded_or_attached(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model: Any = tiny_lm()
    monkeypatch.setattr("transformers.__version__", version)
    expected = rf"transformers {re.escape(version)} is installed.*; supported is 5\.4 to .*pip install"
    for load in (
        lambda: vp.VLAPruner(keep=0.5, preset="paper").attach(model, visual=VISUAL),
        vp.reference_policy,
        lambda: vp.random_policy("openvla"),
        lambda: vp.load_policy(tmp_path),
        lambda: vp.load_policy("reference"),
        lambda: load_pi0(tmp_path),
    ):
        with pytest.raises(vp.UnsupportedModelError, match=expected):
            load()


def test_a_newer_one_is_said_to_be_untested() -> None:
    newer = transformers_problem("5.99.0")
    assert newer is not None
    assert "which no test has run on yet" in newer
    older = transformers_problem("5.3.0")
    assert older is not None
    assert "no test has run" not in older


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_either_name_of_the_cache_reaches_the_pruner_and_nothing_of_ours_warns(pruned: str) -> None:
    """A caller may use the old name if transformers still takes it; the pruned tokens must be the same."""
    model: Any = tiny_lm()
    own = cache_name(model)
    taken = NAMES if own == NAMES[0] else (own,)
    found = []
    for name in taken:
        torch.manual_seed(0)
        embeds = torch.randn(1, 31, 32)
        with vp.FastV(keep=0.25, pruned=pruned).attach(model, visual=VISUAL) as session, torch.no_grad():
            with warnings.catch_warnings():
                # The caller's own use of the old name warns, as it does without a session.
                warnings.simplefilter("error" if name == own else "ignore")
                cache = transformers.DynamicCache(config=model.config)
                output = model(inputs_embeds=embeds, use_cache=True, **{name: cache})
                logits = model(input_ids=torch.tensor([[5]]), **{name: cache}).logits
            assert cache_of(output) is cache
            assert session.kept is not None
            found.append(logits)
    for other in found[1:]:
        assert torch.equal(found[0], other)


def test_where_the_cache_is() -> None:
    cache = object()
    assert cache_in({"past_key_values": cache}) is cache
    assert cache_in({"cache": cache, "past_key_values": None}) is cache
    assert cache_in({"cache": None}) is None
    assert cache_of((1, 2)) is None
    with pytest.raises(vp.UnsupportedModelError, match=r"Linear\.forward takes no key-value cache"):
        cache_name(torch.nn.Linear(2, 2))


def test_one_file_knows_the_name() -> None:
    """Everything else asks it: another file that spells the name works on one side of 5.24 only."""
    package = ROOT / "src" / "vla_pruner"
    spelled = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"""["']past_key_values["']|\.past_key_values|\*\*.*past_key_values=""", path.read_text("utf-8"))
    }
    assert spelled == {"caches.py"}
