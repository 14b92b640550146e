"""The commands that messages give to install lerobot name extras that it has, for every policy."""

from __future__ import annotations

from importlib import metadata

import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.lerobot.test_every_policy import POLICIES
from vla_pruner.families import lerobot_common
from vla_pruner.families.lerobot_common import EXTRAS, install


def test_lerobot_has_the_extras():
    assert set(EXTRAS.values()) <= set(metadata.metadata("lerobot").get_all("Provides-Extra") or ())
    assert set(EXTRAS) >= set(POLICIES)
    assert install() == "pip install 'lerobot[pi,smolvla,molmoact2,groot,eo1,vla-jepa]>=0.6,<0.7'"


@pytest.mark.parametrize("name", POLICIES)
def test_each_policy_names_its_own(name, monkeypatch):
    policy = POLICIES[name]()
    monkeypatch.setattr(lerobot_common.metadata, "version", lambda _: "0.7.0")
    advice = rf"lerobot 0\.7\.0 is installed; 0\.6 is supported\. Run: pip install 'lerobot\[{EXTRAS[name]}\]>="
    for target in (policy, policy.module):
        with pytest.raises(vp.UnsupportedModelError, match=advice):
            vp.FastV(layer=2).attach(target)
    with pytest.raises(vp.UnsupportedModelError, match=advice):
        POLICIES[name]()
