"""Policies that are refused for a reason of their own, even if nothing that they need is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import nn

import vla_pruner as vp
from tests.attach.tiny import VISUAL, tiny_lm
from vla_pruner.families.refused import REASONS

TOLD = {"xvla": "learned position", "wall_x": "exact cache"}


@pytest.mark.parametrize(("module", "name"), REASONS)
def test_attaching_says_why(module: str, name: str) -> None:
    kind = type(name, (nn.Module,), {"__module__": module})
    fine_tuned = type("Mine", (kind,), {})
    installed = set(sys.modules)
    for model in (kind(), fine_tuned()):
        with pytest.raises(vp.UnsupportedModelError, match=TOLD[module.split(".")[2]]):
            vp.VLAPruner(preset="paper").attach(model)
    assert not any(one.startswith("lerobot.policies") for one in set(sys.modules) - installed)


@pytest.mark.parametrize("kind", TOLD)
def test_loading_says_why(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"type": kind}))
    with pytest.raises(vp.UnsupportedModelError, match=TOLD[kind]):
        vp.load_policy(tmp_path)


def test_the_names_are_those_of_lerobot() -> None:
    pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")
    import lerobot.policies

    folder = Path(lerobot.policies.__path__[0])
    for module, name in REASONS:
        source = folder.joinpath(*module.split(".")[2:]).with_suffix(".py").read_text(encoding="utf-8")
        assert f"class {name}(" in source


@pytest.mark.parametrize("attach", [vp.FastV().attach, vp.compiled], ids=["session", "compiled"])
def test_a_policy_of_which_another_library_captured_graphs_says_how_to_switch_it_off(attach) -> None:
    model = tiny_lm()
    model._proprio_hook = object()
    with pytest.raises(vp.UnsupportedModelError, match="PROPRIO_ENGINE=off"):
        attach(model, visual=VISUAL)
