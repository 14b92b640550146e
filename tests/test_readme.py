"""The README's Python runs as it stands, and its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from vla_pruner.models.chunk.loading import SHIPPED_WEIGHTS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(text: str) -> str:
    """The one Python block that contains `text`."""
    (found,) = [each for each in BLOCKS if text in each]
    return found


def _tiny_language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_first_snippet() -> None:
    if not (SHIPPED_WEIGHTS / "metaworld" / "model.safetensors").is_file():
        pytest.skip("the reference policy's weights are not in this tree")
    names: dict[str, Any] = {}
    exec(block("vp.reference_policy("), names)
    assert names["chunk"].shape == (8, 4)
    assert names["session"].kept.shape == (1, 128)


def test_openvla_snippet(monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights instead of a download; the loader has its own tests.
    monkeypatch.setattr(vp, "load_policy", lambda _: vp.random_policy("openvla"), raising=False)
    names: dict[str, Any] = {"vp": vp, "checkpoint": "folder", "image": np.zeros((64, 48, 3), np.uint8)}
    exec(block("vp.load_policy(checkpoint)"), names)
    assert names["chunk"].shape == (1, 7)


def test_counted_flops_are_those_of_the_committed_file() -> None:
    results = ROOT / "benchmarks" / "results"
    assert (results / "family_flops.md").read_text(encoding="utf-8").strip() in README
    from benchmarks.family_flops import FAMILIES, result, table

    counted = json.loads((results / "family_flops.json").read_text(encoding="utf-8"))["families"]
    assert counted == {name: result(family) for name, family in FAMILIES.items()}
    assert table(counted) in README


def test_language_model_snippet() -> None:
    names: dict[str, Any] = {"vp": vp, "lm": _tiny_language_model(), "prompt": torch.randn(1, 262, 16)}
    with torch.inference_mode():
        exec(block("attach(lm, visual"), names)
    assert names["session"].kept is None  # its history is still empty


def test_method_snippet() -> None:
    names: dict[str, Any] = {"__name__": __name__}  # dataclasses look their module up
    exec(compile(block("class MostAttended"), "README.md", "exec", dont_inherit=True), names)
    lm = _tiny_language_model()
    with names["MostAttended"]().attach(lm, visual=slice(1, 17)) as session, torch.inference_mode():
        lm(inputs_embeds=torch.randn(1, 20, 16))
        assert session.kept.shape == (1, 4)


def test_every_link_leads_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        name = str(path.relative_to(ROOT))
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (folder / target).exists(), f"{name} links to {target}"


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
        assert named, name
        assert named <= targets, name


def test_every_option_of_the_method_is_in_the_table() -> None:
    import dataclasses

    table = README.split("### Options of `VLAPruner`")[1].split("###")[0]
    for field in dataclasses.fields(vp.VLAPruner):
        assert f"`{field.name}`" in table


def test_the_table_is_that_of_the_committed_run() -> None:
    run = ROOT / "benchmarks" / "results" / "demo"
    if not (run / "results.json").is_file():
        pytest.skip("no demo run is committed")
    assert (run / "table.md").read_text(encoding="utf-8").strip() in README
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert not results["interrupted"]
    assert not results["machine_was_busy"]
    assert results["conditions"]["processor"] in README
    assert f"{results['paired_episodes']} paired episodes" in README
    for arm in results["arms"]:
        assert arm["title"] in README
        assert f"{arm['success']['successes']}/{arm['success']['total']}" in README
