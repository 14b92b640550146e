"""The Python of docs/start-lerobot.md and docs/lerobot.md for LeRobot's own policies runs as it stands."""

from __future__ import annotations

import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.docs.pages import blocks, page
from tests.lerobot.test_sessions import build, each_kind, scene


@each_kind
def test_a_policy_is_pruned_in_place(kind, capsys):
    policy = build(kind)
    block = next(block for block in blocks(page("start-lerobot.md")) if "select_action" in block)
    names = {"policy": policy.module, "batch": scene(policy)}
    exec(block, names)
    assert names["action"].shape[0] == 1
    assert "control step 1" in capsys.readouterr().out
    assert not names["session"].attached


def test_a_policy_is_asked_whether_it_is_faster(capsys):
    policy = build("smolvla")
    (block,) = (block for block in blocks(page("lerobot.md")) if "only_if_faster=True)" in block)
    names = {"policy": policy.module, "vp": vp}
    exec(block, names)
    names["session"].detach()
    assert "of the FLOPs of a control step" in capsys.readouterr().out
