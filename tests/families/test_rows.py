"""Every row of the registry: the objects that it names exist, and belong to its policy."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

import vla_pruner as vp
from tests.families.test_matrix import FAMILIES
from vla_pruner.benching.feeds import feed_of
from vla_pruner.families import family_of
from vla_pruner.plugins import object_at
from vla_pruner.policies.base import module_of
from vla_pruner.registry import ROWS, Row, row_for, row_named, row_of

HERE = tuple(row for row in ROWS if not row.name.startswith("lerobot"))
LOADED = ("device", "dtype")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_all_that_a_row_names_is_there_and_takes_what_it_is_given(row: Row) -> None:
    assert inspect.isclass(object_at(row.policy))
    family = object_at(row.family)
    assert callable(family.matches)
    assert (row.load is None) == (row.config is None)
    if row.load is not None:
        assert set(LOADED) <= set(inspect.signature(object_at(row.load)).parameters)
    taken = {row.random: 4}
    if row.bench is not None:
        taken |= {row.bench.feed: 3, row.bench.build: 3}
    taken |= dict.fromkeys(row.conventions.values(), 2)
    for path, count in taken.items():
        assert path is None or len(inspect.signature(object_at(path)).parameters) == count, path


@pytest.mark.parametrize("row", [row for row in HERE if row.random is not None], ids=lambda row: row.name)
def test_a_policy_with_random_weights_is_of_its_row(row: Row) -> None:
    policy = vp.random_policy(row.name)
    assert row_of(policy) is row
    assert type(family_of(policy)) is object_at(row.family)
    assert row.bench is not None
    assert feed_of(policy) is object_at(row.bench.feed)
    assert next(module_of(policy).parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["reference", "reference-chunk", "openvla", "openvla-oft", "pi0"])
def test_a_class_that_extends_a_known_one_is_of_its_family(name: str) -> None:
    """Such as a user's own, or the one that torch's `fully_shard` makes of a module in place."""
    policy = vp.random_policy(name)
    module = module_of(policy)
    expected = type(family_of(module))
    module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    assert type(family_of(module)) is expected


@pytest.mark.parametrize(
    "name", ["ReferencePolicy", "ChunkPolicy", "OpenVLAOFT", "PI0ForConditionalGeneration", "PeftModel"]
)
def test_a_class_that_has_the_name_of_a_known_one_alone_is_refused(name: str) -> None:
    with pytest.raises(vp.UnsupportedModelError, match=f"{name} was given; supported are"):
        vp.FastV().attach(type(name, (torch.nn.Module,), {})())


def test_names_and_aliases_are_all_different() -> None:
    names = [name for row in ROWS for name in (row.name, *row.aliases)]
    assert len(set(names)) == len(names)
    assert [row_named(name) for name in names] == [row for row in ROWS for _ in (row.name, *row.aliases)]
    assert row_named("no-such-policy") is None


def test_a_folder_is_of_the_first_row_that_fits() -> None:
    assert row_for({"model_type": "openvla"}) is row_named("openvla")
    assert row_for({"type": "pi05"}) is row_named("lerobot-pi05")
    assert row_for({"type": "pi05", "model_type": "llama"}) is None
    assert row_for({"proprio_mean": [], "vision_width": 3}) is row_named("reference")
    assert row_for({"proprio_mean": [], "vision_width": 3, "executed": 4}) is row_named("reference-chunk")


def test_every_family_of_a_row_is_in_the_matrix() -> None:
    found = {type(family_of(case.build(), **case.options)) for case in FAMILIES}
    assert found >= {object_at(row.family) for row in HERE}


def test_the_table_costs_nothing() -> None:
    heavy = "{'torch', 'transformers', 'lerobot', 'vla_pruner.families', 'vla_pruner.policies'}"
    code = f"import sys, vla_pruner.registry as r; r.row_named('pi05'); print({heavy} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "set()"
