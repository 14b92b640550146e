"""A method from outside of the package, by its name or by its module and class, in every command; and refusals."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.evaluation.fakes import find_fake, settings
from tests.plugins.distributions import install, install_example
from vla_pruner import cli, plugins
from vla_pruner.benching.command import add_bench
from vla_pruner.benching.command import settings_of as bench_settings_of
from vla_pruner.calibration import CalibrationError
from vla_pruner.calibration.agreement import arms_of, closed_loop_losses
from vla_pruner.calibration.flags import add_calibrate
from vla_pruner.calibration.flags import settings_of as calibrate_settings_of
from vla_pruner.errors import OptionError, PluginError
from vla_pruner.evaluation import EvaluationError
from vla_pruner.evaluation.arms import method_arms
from vla_pruner.evaluation.command import run_eval
from vla_pruner.evaluation.flags import add_eval
from vla_pruner.evaluation.flags import settings_of as eval_settings_of
from vla_pruner.evaluation.manifest import Manifest
from vla_pruner.method_names import known_methods, methods_of
from vla_pruner.methods import FastV, Method, RandomKeep
from vla_pruner.serving.command import _method as method_of
from vla_pruner.serving.flags import add_serve

PATH = "vla_pruner_example.brightest:Brightest"
TEXTS = ("brightest:power=3:smallest=true", f"{PATH}:power=3:smallest=true")

OWN = """
from dataclasses import dataclass
import vla_pruner as vp

@dataclass(frozen=True)
class Own(vp.FastV):
    power: int = 1

class NoMethod:
    keep = 0.25

@dataclass(frozen=True)
class NoKeep(vp.Method):
    pass

@dataclass(frozen=True)
class NoSelect(vp.Method):
    keep: float = 0.25

@dataclass(frozen=True)
class NoDefault(vp.FastV):
    must: int = None
    def __post_init__(self):
        raise RuntimeError("must is needed")

@dataclass(frozen=True)
class Strange(vp.FastV):
    treatments = ("burn",)
    pruned: str = "burn"

number = 3
"""


def parsed(text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for add in (add_bench, add_calibrate, add_eval, add_serve):
        add(commands)
    return parser.parse_args(text.split())


def kind_of(text: str) -> type[Method]:
    (made,) = methods_of([text])
    return type(made.method)


@pytest.mark.parametrize("text", TEXTS)
def test_a_name_and_a_path_make_the_same_method(example: Path, text: str) -> None:
    (made,) = methods_of([text], keep=[0.5], layers=[2], pruned=["freeze"])
    kind = sys.modules["vla_pruner_example.brightest"].Brightest
    assert made.method == kind(keep=0.5, layer=2, pruned="freeze", power=3, smallest=True)
    assert made.title == f"{text.partition(':power')[0]} 0.5 freeze K=2 power=3 smallest=true"
    assert list(known_methods()) == [name for name in known_methods() if name != "brightest"]


@pytest.mark.parametrize("text", ["Brightest", "brightest", "BRIGHTEST"])
def test_a_name_is_read_as_those_of_the_package_are(example: Path, text: str) -> None:
    assert kind_of(text).__name__ == "Brightest"


def test_nothing_is_imported_before_it_is_asked_for(example: Path) -> None:
    methods_of(["fastv", "vla-pruner"])
    with pytest.raises(OptionError, match=r"it is one of action-and-diversity.*, brightest, or a method of your own"):
        methods_of(["brightes"])
    assert "vla_pruner_example" not in sys.modules


@pytest.mark.parametrize("text", TEXTS)
def test_every_command_takes_it(example: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_it(method: Any) -> bool:
        return type(method).__name__ == "Brightest" and method.power == 3

    benched = bench_settings_of(parsed(f"bench --model llama:64,4 --method {text}"))
    assert is_it(benched.chosen_methods()[0].method)
    evaluated = eval_settings_of(parsed(f"eval --policy reference --suite x --out {tmp_path} --method {text}"))
    assert is_it(evaluated.arms()[1].method)
    calibrated = f"calibrate --policy reference --from {tmp_path} --method {text} --controls none"
    assert is_it(calibrate_settings_of(parsed(calibrated)).arms()[0].method)
    assert is_it(method_of(parsed(f"serve --policy reference --method {text}")))
    audited: list[Any] = []

    def audit(policy: Any, method: Any, **_: Any) -> None:
        audited.append(method)
        raise KeyboardInterrupt

    monkeypatch.setattr("vla_pruner.auditing.command.audit", audit)
    assert cli.main(["audit", "openvla", "--random-weights", "--method", text]) == 130
    assert is_it(audited[0])


def run(folder: Path, text: str) -> tuple[int, Manifest]:
    asked = settings(folder, "tiny", methods=(text,), keep=(0.5,), layer=(1,), controls=("random",), episodes=1)
    code = run_eval(asked, Console(file=io.StringIO(), width=200), find_fake)
    return code, Manifest.read(folder)


def forget(module: str) -> None:
    """Forget a module, so that the test begins as a new process does."""
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        del sys.modules[name]
    plugins._plugins.cache_clear()
    plugins._source.cache_clear()


def test_a_run_says_where_its_method_came_from_and_does_not_go_on_with_another_version(
    site: Path, tmp_path: Path
) -> None:
    install_example(site, "1.0")
    code, manifest = run(tmp_path / "run", "brightest")
    assert code == 0
    arms = manifest.identity["arms"]
    assert arms[1]["source"] == {"class": PATH, "distribution": "vla-pruner-example", "version": "1.0"}
    assert [arm for arm in arms if "source" in arm] == [arms[1]], "a run of the package's own methods is as it was"
    assert run(tmp_path / "run", "brightest")[0] == 0, "the same version goes on"

    (site / "vla_pruner_example-1.0.dist-info").rename(site / "old")
    install_example(site, "2.0")
    forget("vla_pruner_example")
    with pytest.raises(
        EvaluationError, match=r"source of the arm 'brightest 0.5 drop K=1': .*1\.0.*, not .*2\.0"
    ) as told:
        run(tmp_path / "run", "brightest")
    assert "\n" not in str(told.value)


def test_a_loose_module_is_known_by_its_content(site: Path, tmp_path: Path) -> None:
    (site / "own_methods.py").write_text(OWN)
    _, manifest = run(tmp_path / "run", "own_methods:Own:power=2")
    assert set(manifest.identity["arms"][1]["source"]) == {"class", "sha256"}
    (site / "own_methods.py").write_text(OWN + "\n# edited\n")
    forget("own_methods")
    with pytest.raises(EvaluationError, match=r"source of the arm 'own_methods:Own 0\.5 drop K=1 power=2'"):
        run(tmp_path / "run", "own_methods:Own:power=2")


def test_a_module_of_a_distribution_without_entry_points_has_its_version(site: Path) -> None:
    (site / "own_methods.py").write_text(OWN)
    install(site, "my-methods", "0.3", {}, "own_methods.py,,\n")
    (made,) = methods_of(["own_methods:Own"])
    source = plugins.source_of(type(made.method))
    assert source == {"class": "own_methods:Own", "distribution": "my-methods", "version": "0.3"}


def test_methods_of_the_package_have_no_source() -> None:
    assert plugins.source_of(FastV) is None
    assert [arm.to_json().keys() & {"source"} for arm in method_arms(["fastv"], None, [3], None)] == [set()]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no_such_module:Own", r"no_such_module cannot be imported \(ModuleNotFoundError.*PYTHONPATH"),
        ("own_methods.sub:Own", r"own_methods.sub cannot be imported"),
        ("own_methods:Missing", r"own_methods .*own_methods\.py\) has no such class: Missing"),
        ("own_methods:number", r"has number, which is a int and no class"),
        ("own_methods:NoMethod", r"own_methods:NoMethod is no method: it does not extend vla_pruner.Method"),
        ("own_methods:NoKeep", "no option `keep`"),
        ("own_methods:NoSelect", "does not define budget and select"),
        ("own_methods:NoDefault", r"cannot be made without options \(RuntimeError: must is needed\)"),
        ("own_methods:Strange", r"has the treatments \('burn',\); they are some of drop, freeze, reuse"),
        ("own_methods:", "'own_methods:' is no module and class"),
        (":Own", "':Own' is no module and class"),
        ("own-methods:Own", "'own-methods:Own' is no module and class"),
        ("../own_methods:Own", "is no module and class"),
        ("broken_methods:Own", r"broken_methods cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("leaving_methods:Own", r"leaving_methods cannot be imported \(SystemExit: 3\)"),
    ],
)
def test_a_path_that_names_no_method_is_one_sentence(site: Path, text: str, told: str) -> None:
    (site / "own_methods.py").write_text(OWN)
    (site / "broken_methods.py").write_text("1 / 0\n")
    (site / "leaving_methods.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(PluginError, match=told) as error:
        methods_of([text])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        # "random" is a module of Python, too: the method's name wins.
        ("random:seed", "has the option 'seed'; random takes .*seed=.*A module of your own needs another name"),
        ("vla-pruner:window", "has the option 'window'; vla-pruner takes"),
        ("fastv:FastV", "has the option 'FastV'; fastv takes"),
        ("fastv:layer=2:last", "has the option 'last'; fastv takes"),
        ("own_methods:Own:last", "has the option 'last'; own_methods:Own takes layer=..., "),
        ("own_methods:Own:hue=3", "has the option 'hue=3'; own_methods:Own takes"),
        ("own_methods", "it is one of"),
        ("own_methods.Own", "or a method of your own as MODULE:CLASS"),
        ("brightest:smallest=1", "smallest of brightest is true or false"),
        ("brightest:power=0", "brightest refuses .*power=0.*: ValueError: the power of a norm is larger than 0"),
        ("", "it is one of"),
    ],
)
def test_what_is_no_path_is_read_as_a_name_and_options(example: Path, text: str, told: str) -> None:
    (example / "own_methods.py").write_text(OWN)
    with pytest.raises(OptionError, match=told):
        methods_of([text])


def test_a_broken_distribution_breaks_no_other_name(example: Path) -> None:
    entries = {"away": "no_such_module:Mine", "odd": "not a path", "fastv": "no_such_module:FastV"}
    install(example, "broken-one", "7.1", {plugins.METHODS: entries})
    (example / "garbage-0.1.dist-info").mkdir()
    (example / "garbage-0.1.dist-info" / "entry_points.txt").write_bytes(b"[vla_pruner.methods\n\xff\xfe = = :\nx")
    assert kind_of("fastv") is FastV
    assert kind_of("brightest").__name__ == "Brightest"
    for name in ("away", "odd"):
        with pytest.raises(PluginError, match=f"{name} .* of the distribution broken-one 7.1 cannot be used: "):
            methods_of([name])


def test_a_name_of_two_distributions_is_refused(example: Path) -> None:
    install(example, "another", "3", {plugins.METHODS: {"Brightest": "own_methods:Own"}})
    with pytest.raises(PluginError, match=r"distribution another 3 and .*vla-pruner-example 1\.0; uninstall one"):
        methods_of(["brightest"])
    assert methods_of([PATH])[0].name == PATH


def write_info(folder: Path, arms: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    run = {"identity": {"weights": "abc", "arms": arms}, "plan": {"policy_seed": len(folder.name)}}
    (folder / "eval_info.json").write_text(json.dumps({"run": run, "summary": {"arms": []}}))
    return folder


def test_a_file_says_not_what_is_imported(example: Path, tmp_path: Path) -> None:
    (named, pathed) = (method_arms([text], [0.5], [2], ["drop"])[0].to_json() for text in ("brightest", PATH))
    assert (
        arms_of([write_info(tmp_path / "named", [named])])[0].method == methods_of(["brightest"], [0.5], [2])[0].method
    )
    (example / "side_effect.py").write_text("raise AssertionError('a file had this imported')\n")
    del pathed["options"]
    for folder, title in (("strange", "side_effect:Mine 0.5 drop K=2"), ("odd", "side_effect 0.5 drop K=2 Mine")):
        with pytest.raises(CalibrationError, match="not imported because a file names it; name the arms"):
            arms_of([write_info(tmp_path / folder, [{**pathed, "title": title}])])
    assert "side_effect" not in sys.modules


def test_evaluations_with_two_versions_of_a_method_are_not_pooled(example: Path, tmp_path: Path) -> None:
    arm = method_arms(["brightest"], [0.5], [2], ["drop"])[0].to_json()
    other = {**arm, "source": {**arm["source"], "version": "2.0"}}
    folders = [write_info(tmp_path / "a", [arm]), write_info(tmp_path / "bb", [other])]
    with pytest.raises(CalibrationError, match=r"of two versions \(.*version 1\.0 and .*version 2\.0\)"):
        closed_loop_losses(folders)


def test_the_random_control_draws_for_a_foreign_method_too(example: Path, tmp_path: Path) -> None:
    arms = settings(tmp_path, "tiny", methods=("brightest",), keep=(0.5,), controls=("random",)).arms()
    assert arms[-1].method == RandomKeep(keep=0.5, layer=3)
