"""The Python of the documentation's pages runs as it stands, on random weights; their commands are understood."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import vla_pruner as vp
from tests.docs.pages import DOCS, ROOT, blocks, page, understood
from vla_pruner.models.chunk.loading import SHIPPED_WEIGHTS
from vla_pruner.policies.lerobot import KINDS

Capture = pytest.CaptureFixture[str]


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a block of a page; dataclasses look for the module of their class."""
    names.setdefault("__name__", __name__)
    exec(compile(code, "a page of docs/", "exec", dont_inherit=True), names)
    return names


def test_openvla_oft_from_loading_to_the_fifth_step(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(vp, "load_policy", lambda _, device: vp.random_policy("openvla-oft"), raising=False)
    names: dict[str, Any] = {}
    for block in blocks(page("start-openvla-oft.md")):
        run(block, names)
    assert names["chunk"].shape[1] == 7
    tokens = names["session"].step.layout.tokens
    assert names["session"].kept.shape == (1, tokens // 4)
    assert f"{tokens // 4} of {tokens} visual tokens kept" in capsys.readouterr().out


def test_pi0_without_lerobot(capsys: Capture) -> None:
    in_lerobot, alone = blocks(page("start-lerobot.md"))
    assert "select_action" in in_lerobot  # tests/lerobot/test_document.py runs it
    names = run(alone, {})
    assert names["chunk"].ndim == 2
    assert "control step 5" in capsys.readouterr().out


def test_your_own_decoder_and_vision_language_model(capsys: Capture) -> None:
    decoder, model = blocks(page("start-own-model.md"))
    run(decoder, {})
    shapes = re.findall(r"# \(([\d, ]+)\):", "".join(line for line in decoder.splitlines(True) if "print(" in line))
    assert capsys.readouterr().out.splitlines() == [f"torch.Size([{shape}])" for shape in shapes]
    names = run(model, {})
    assert names["tokens"].shape == (1, 23)
    assert "4 of 16 visual tokens kept" in capsys.readouterr().out


def test_a_vlm_policy_of_your_own(capsys: Capture) -> None:
    (block,) = blocks(page("vlm.md"))
    names = run(block, {})
    assert names["chunk"].shape == (8, 7)
    told, shape = capsys.readouterr().out.splitlines()
    assert "8 of 32 visual tokens kept" in told
    assert shape == f"torch.Size([{re.search(r'print.session.kept.shape.  # .([0-9, ]+).:', block)[1]}])"  # type: ignore[index]


def test_what_vlm_policies_gain_is_what_was_counted() -> None:
    rows = {
        line.split("|")[1].strip(): line.split("|")[3] for line in page("models.md").splitlines() if "own head" in line
    }
    told = " ".join(page("vlm.md").split())
    for name, shown in (
        ("LLaVA-1.5-7B", "leaves LLaVA-1.5-7B {}"),
        ("PaliGemma-3B-224", "PaliGemma {},"),
        ("Qwen3-VL-2B", "Qwen3-VL-2B {}"),
        ("SmolVLM2-500M", "SmolVLM2 {},"),
    ):
        left = rows[f"{name}, own head"].split("/")[1].strip()
        assert shown.format(left) in told


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_export_prints_what_the_page_says(capsys: Capture) -> None:
    names: dict[str, Any] = {}
    for code, printed in zip(blocks(page("export.md")), blocks(page("export.md"), ""), strict=True):
        run(code, names)
        assert capsys.readouterr().out == printed


def test_a_family_of_your_own(capsys: Capture) -> None:
    (block,) = blocks(page("adding-a-family.md"))
    names = run(block, {})
    assert names["action"].shape == (1, 7)
    assert "16 of 64 visual tokens kept" in capsys.readouterr().out


def test_a_method_of_your_own() -> None:
    rule, proof = blocks(page("adding-a-method.md"))
    names = run(rule, {})
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2
    )
    lm = LlamaForCausalLM(config).eval()
    with names["MostAttended"]().attach(lm, visual=slice(1, 17)) as session, torch.inference_mode():
        lm(inputs_embeds=torch.randn(1, 20, 16))
        assert session.kept.shape == (1, 4)
    if not (SHIPPED_WEIGHTS / "metaworld" / "model.safetensors").is_file():
        pytest.skip("the reference policy's weights are not in this tree")
    run(proof, names)


SPOKEN = {
    "pi0": "pi0",
    "pi05": "pi0.5",
    "pi0_fast": "pi0-FAST",
    "smolvla": "SmolVLA",
    "molmoact2": "MolmoAct2",
    "eo1": "EO-1",
    "vla_jepa": "VLA-JEPA",
}
"""LeRobot's policies as texts name them, by LeRobot's own names."""


def test_every_text_names_every_lerobot_policy_that_is_loaded() -> None:
    assert SPOKEN.keys() == KINDS.keys()
    plugin = ROOT / "plugins" / "lerobot_policy_vla_pruner"
    (flag,) = [line for line in page("lerobot.md").splitlines() if line.startswith("| `--policy.pretrained_path`")]
    (described,) = [line for line in (plugin / "pyproject.toml").read_text().splitlines() if "description" in line]
    for text in (flag, described, (plugin / "README.md").read_text()):
        assert [name for name in SPOKEN.values() if not re.search(rf"{re.escape(name)}(?![\w.-]\w)", text)] == []
    rows = [line.split("|") for line in page("models.md").splitlines() if line.startswith("| ")]
    loaded = [cells[1] for cells in rows if "`load_policy`" in cells[2]]
    assert [name for name in SPOKEN.values() if not any(name in kinds for kinds in loaded)] == []


PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def commands() -> list[tuple[str, str]]:
    """Every command of the pages that have no document test of their own."""
    tested = {"audit.md", "calibrate.md", "evaluation.md", "performance.md", "report.md", "serving.md"}
    return [
        (name, line.split("  #")[0].strip())
        for name in PAGES
        if name not in tested
        for block in blocks(page(name), "")
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
        if re.match(r"(PYTHONPATH=\S+ )?vla-pruner ", line)
    ]


def test_the_commands_are_understood() -> None:
    found = commands()
    assert len(found) >= 20
    for _, line in found:
        understood(line)


def test_the_site_has_every_page_in_its_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert sorted(re.findall(r"(\S+\.md)$", menu, re.MULTILINE)) == PAGES
