"""`audit --certificate` and `--compare`: a machine can compare its own audit with another machine's."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from rich.console import Console

import vla_pruner as vp
from vla_pruner.auditing import command
from vla_pruner.auditing.certificate import certificate, differences, digest, digests_of
from vla_pruner.auditing.command import AuditSettings, run_audit
from vla_pruner.auditing.report import AuditReport, Check

SETTINGS = {"torch": "2.13.0", "device": "cpu", "cameras": ["image"], "seconds": 3.0}
CHECKS = (
    Check("keep 1.0", True, "6 control steps bit-identical", "", 12),
    Check("scenes", None, "", "RandomKeep does not look at the scene."),
)


def report(**changed):
    return AuditReport(**{"policy": "P", "method": "M()", "settings": SETTINGS, "checks": CHECKS, **changed})


@pytest.fixture(scope="module")
def policy():
    return vp.random_policy("reference", "tiny")


@pytest.fixture
def audited(monkeypatch, policy):
    """A function that runs the command with a prepared report, and returns the exit code and the printed text."""

    def run(found=None, **settings):
        console = Console(record=True, width=200)
        monkeypatch.setattr(command, "asked_policy", lambda *_, **__: policy)
        monkeypatch.setattr(command, "audit", lambda *_, **__: report() if found is None else found)
        code = run_audit(AuditSettings("reference", random_weights=True, **settings), console)
        return code, console.export_text()

    return run


def test_a_certificate_says_what_was_proven_of_what(tmp_path, audited, policy):
    file = tmp_path / "certificate.json"
    assert audited(certificate=str(file))[0] == 0
    found = json.loads(file.read_text())
    assert found["format"] == "vla-pruner certificate 1"
    assert found["passed"] is True
    assert found["settings"] == SETTINGS
    assert found["checks"][0] == {
        "name": "keep 1.0",
        "passed": True,
        "figure": "6 control steps bit-identical",
        "observations": 12,
    }
    assert found["checks"][1]["passed"] is None
    assert found["weights"] == digest(policy.state_dict())
    assert found["files"] == {}
    code, said = audited(compare=str(file))
    assert code == 0
    assert "Nothing here contradicts" in said
    assert "differs" not in said


def test_another_machine_may_differ_in_versions_and_not_in_verdicts(tmp_path, audited):
    file = tmp_path / "certificate.json"
    audited(certificate=str(file))
    code, said = audited(report(settings={**SETTINGS, "torch": "2.11.0", "seconds": 9.0}), compare=str(file))
    assert code == 0
    assert "differs: torch: 2.11.0 here, 2.13.0 there" in said
    assert "seconds" not in said
    failed = (dataclasses.replace(CHECKS[0], passed=False), CHECKS[1])
    code, said = audited(report(checks=failed), compare=str(file))
    assert code == 1
    assert "WRONG: keep 1.0: failed here, passed there" in said


def test_other_weights_files_and_methods_are_told(tmp_path, policy):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "notes.txt").write_bytes(b"no weights")
    one = certificate(report(), policy, str(folder))
    assert list(one.files) == ["model.safetensors"]
    assert one.files == digests_of(folder)
    (folder / "model.safetensors").write_bytes(b"weightz")
    other = vp.random_policy("reference", "tiny", seed=1)
    wrong, others = differences(certificate(report(method="N()"), other, str(folder)), one)
    assert others == []
    assert wrong[0].startswith("the weights are others")
    assert wrong[1:] == ["the file model.safetensors is another", "the method is another: N() here, M() there"]
    fewer = dataclasses.replace(one, checks=one.checks[:1])
    assert differences(one, fewer) == ([], ["scenes was not asked there"])


@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: t.double(), lambda t: t.reshape(3, 2)])
def test_a_digest_is_of_numbers_types_and_shapes(change):
    tensor = torch.arange(6.0).reshape(2, 3)
    assert digest({"a": tensor}) == digest({"a": tensor.T.contiguous().T})
    assert digest({"a": tensor}) != digest({"a": change(tensor)})
    assert digest({"a": tensor}) != digest({"b": tensor})
    assert digest({"a": tensor.bfloat16()}) == digest({"a": tensor.bfloat16().clone()})


@pytest.mark.parametrize("content", ["", "{}", '{"format": "vla-pruner certificate 1"}', "[1]", '{"format": "other"}'])
def test_what_is_no_certificate_is_refused_before_anything_runs(tmp_path, audited, content):
    file = tmp_path / "certificate.json"
    file.write_text(content)
    with pytest.raises(vp.OptionError, match="which is no certificate"):
        audited(compare=str(file))
    with pytest.raises(vp.OptionError, match="which is no certificate"):
        audited(compare=str(tmp_path / "absent.json"))
    with pytest.raises(vp.OptionError, match="--certificate is"):
        audited(certificate=str(tmp_path / "absent" / "certificate.json"))


def test_checks_count_the_control_steps_that_they_ran(policy, monkeypatch):
    from vla_pruner.auditing import run

    monkeypatch.setattr(run, "CHECKS", {name: run.CHECKS[name] for name in ("environment", "keep 1.0")})
    found = vp.audit(policy, vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper"))
    assert found["environment"].observations == 0
    # Two steps until one is pruned and two more, unpruned and with every token kept.
    assert found["keep 1.0"].observations == 8
    assert found["keep 1.0"].figure == "4 control steps bit-identical"
