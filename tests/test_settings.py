"""The settings of every subcommand refuse numbers of the wrong kind, whichever of their fields they are given for."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from rich.console import Console

from vla_pruner.auditing.command import AuditSettings, run_audit
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.calibration import CalibrateSettings
from vla_pruner.demo.settings import DemoSettings
from vla_pruner.errors import VLAPrunerError
from vla_pruner.evaluation import EvalSettings, PolicySource
from vla_pruner.serving import ServerSettings

POLICY = PolicySource("reference")
MAKE = {
    ServerSettings: ServerSettings,
    EvalSettings: lambda **asked: EvalSettings(POLICY, ("metaworld:mt6",), Path("out"), **asked),
    CalibrateSettings: lambda **asked: CalibrateSettings(POLICY, Path("recordings"), **asked).arms(),
    BenchSettings: lambda **asked: BenchSettings("reference", **asked),
    DemoSettings: lambda **asked: DemoSettings(**asked).check(),
    AuditSettings: lambda **asked: run_audit(AuditSettings("no/such/checkpoint", **asked), Console(quiet=True)),
}
"""How each of them is made and checked."""

WHOLE = (0.5, 1.0, True, math.nan, -1, "3")
REAL = (True, math.nan, math.inf, -1.0, "3")
BUDGET = (True, math.nan, -1, -0.5, "3")
WRONG: dict[Any, tuple[Any, ...]] = {
    int: WHOLE,
    int | None: WHOLE,
    float: REAL,
    float | None: REAL,
    float | int: BUDGET,
    tuple[int, ...]: (*((one,) for one in WHOLE), 0.5),
    tuple[int, ...] | None: (*((one,) for one in WHOLE), 0.5),
    tuple[float | int, ...] | None: (*((one,) for one in BUDGET), math.nan),
    tuple[int, int] | None: ((0.5, 2), (1, 2.0), (True, 2), (math.nan, 2), (-1, 2), (1, 2, 3)),
}
"""By a field's type, values that are none of it, or that no field of it takes."""


def cases() -> Iterator[Any]:
    for kind in MAKE:
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            for value in WRONG.get(hints[field.name], ()):
                yield pytest.param(kind, field.name, value, id=f"{kind.__name__}-{field.name}-{value!r}")


@pytest.mark.parametrize(("kind", "name", "value"), list(cases()))
def test_a_number_of_the_wrong_kind_is_refused_by_its_name(kind: Any, name: str, value: Any) -> None:
    needs = {"encoder_refresh": {"encoder_keep": (0.5,)}}.get(name, {})
    with pytest.raises(VLAPrunerError) as refused:
        MAKE[kind](**{name: value}, **needs)
    said = str(refused.value)
    named = {"encoder_keep": "keep", "encoder_refresh": "refresh_every"}.get(name, name)
    assert named in said.replace("-", "_")
    assert "does not apply" not in said


@pytest.mark.parametrize("kind", list(MAKE))
def test_every_field_that_holds_a_number_is_among_them(kind: Any) -> None:
    hints = get_type_hints(kind)
    unknown = [name for name, hint in hints.items() if hint not in WRONG and re.search(r"\b(int|float)\b", str(hint))]
    assert not unknown


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (EvalSettings, {"methods": "fastv"}),
        (EvalSettings, {"keep": 0.25}),
        (EvalSettings, {"controls": "random"}),
        (CalibrateSettings, {"tasks": "push"}),
        (CalibrateSettings, {"against": Path("run")}),
        (DemoSettings, {"tasks": "push"}),
        (ServerSettings, {"prompts": "push the puck"}),
        (DemoSettings, {"quick": "no"}),
        (DemoSettings, {"compile": "no"}),
    ],
)
def test_one_value_is_no_tuple_and_a_word_no_switch(kind: Any, asked: dict[str, Any]) -> None:
    ((name, value),) = asked.items()
    with pytest.raises(VLAPrunerError) as refused:
        MAKE[kind](**asked)
    said = str(refused.value)
    assert f"{name.removesuffix('s')}" in said
    assert repr(value) in said
    assert "True or False" in said or "it is a tuple" in said
