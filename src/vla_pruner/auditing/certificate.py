"""Certificate of an audit on this machine for one checkpoint, as JSON that another machine can compare with its own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_pruner.auditing.report import AuditReport
from vla_pruner.errors import OptionError
from vla_pruner.json_file import read_format, typed
from vla_pruner.policies.base import module_of

FORMAT = "vla-pruner certificate 1"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.json")
"""Files of a checkpoint's folder that determine its computation."""
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Verdict:
    """The result of one check.

    Attributes:
        name: name of the check.
        passed: None if the check could not be run.
        figure: the measurement, in a few words.
        observations: the number of control steps that it ran.
    """

    name: str
    passed: bool | None
    figure: str
    observations: int


@dataclass(frozen=True)
class Certificate:
    """The results of an audit, with the policy, its weights and the machine.

    Attributes:
        model: the model as it was named for the audit.
        policy: class of the policy.
        weights: SHA-256 of all tensors as they were loaded, with their names, shapes and types.
        files: SHA-256 of the checkpoint's files by their names in its folder; empty if there is no folder.
        method: the method's repr.
        passed: True if no check failed.
        settings: device, dtype, attention backend, sizes and versions.
        checks: the result of each check.
    """

    model: str
    policy: str
    weights: str
    files: Mapping[str, str]
    method: str
    passed: bool
    settings: Mapping[str, Any]
    checks: tuple[Verdict, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as a dict for `json.dump`."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def certificate(report: AuditReport, policy: Any, model: str) -> Certificate:
    """Return the certificate of an audit.

    Args:
        report: report of the audit.
        policy: the audited policy.
        model: the folder or name from which it was loaded.
    """
    folder = Path(model)
    return Certificate(
        model=model,
        policy=report.policy,
        weights=digest(module_of(policy).state_dict()),
        files=digests_of(folder) if folder.is_dir() else {},
        method=report.method,
        passed=report.passed,
        settings=report.settings,
        checks=tuple(Verdict(one.name, one.passed, one.figure, one.observations) for one in report.checks),
    )


def read_certificate(path: str) -> Certificate:
    """Read the certificate in a file.

    Raises:
        OptionError: the file cannot be read, or holds no certificate.
    """
    try:
        return read_format(Path(path), FORMAT, lambda content: typed(Certificate, content, "the certificate"))
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise OptionError(
            f"--compare is {path}, which is no certificate ({said}); give a file that --certificate wrote."
        ) from error


def differences(here: Certificate, there: Certificate) -> tuple[list[str], list[str]]:
    """Return the differences of two certificates: those that contradict the other one, and those that machines may
    have.
    """
    wrong, others = [], []
    if here.weights != there.weights:
        wrong.append(f"the weights are others: {here.weights[:12]} here, {there.weights[:12]} there")
        names = sorted(set(here.files) | set(there.files))
        wrong += [f"the file {name} is another" for name in names if here.files.get(name) != there.files.get(name)]
    for name in ("policy", "method"):
        if getattr(here, name) != getattr(there, name):
            wrong.append(f"the {name} is another: {getattr(here, name)} here, {getattr(there, name)} there")
    verdicts = {one.name: one.passed for one in there.checks}
    for check in here.checks:
        if check.name not in verdicts:
            others.append(f"{check.name} was not asked there")
        elif check.passed != verdicts[check.name]:
            said = f"{check.name}: {_said(check.passed)} here, {_said(verdicts[check.name])} there"
            (wrong if check.passed is False else others).append(said)
    for name in sorted(set(here.settings) | set(there.settings)):
        one, other = here.settings.get(name), there.settings.get(name)
        if name != "seconds" and one != other:
            others.append(f"{name}: {one} here, {other} there")
    return wrong, others


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, shapes and types, on whatever device they are."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            found.update(flat[start : start + _CHUNK].cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digests_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a checkpoint's files by their names."""
    return {str(path.relative_to(folder)): _of_file(path) for path in _files(folder)}


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern) if path.is_file())


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _said(passed: bool | None) -> str:
    return {True: "passed", False: "failed", None: "could not be asked"}[passed]
