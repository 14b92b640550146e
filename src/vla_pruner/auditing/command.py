"""`vla-pruner audit`: settings checked first, then the policy, the audit, the checklist and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vla_pruner.auditing.certificate import Certificate, certificate, differences, read_certificate
from vla_pruner.auditing.report import AuditReport
from vla_pruner.auditing.run import audit
from vla_pruner.auditing.subject import check_request
from vla_pruner.auditing.table import print_check, summary
from vla_pruner.errors import CheckpointError, OptionError, UnsupportedModelError
from vla_pruner.json_file import check_file, replace_file, unwritable
from vla_pruner.method_names import methods_of
from vla_pruner.methods import Method
from vla_pruner.policies.base import Policy
from vla_pruner.policies.loading import load_policy
from vla_pruner.policies.options import as_dtype, usable_device
from vla_pruner.policies.random import random_policy
from vla_pruner.registry import random_names, row_named
from vla_pruner.terminal import say, waiting


@dataclass(frozen=True)
class AuditSettings:
    """The settings of the command line.

    Attributes:
        model: a folder, a hub id, "reference", or with `random_weights` a name of `vla_pruner.registry`.
        random_weights: whether weights are drawn.
        size: "tiny" or "full", with `random_weights`; None: "tiny".
        method: its name, with options of its own after colons.
        keep, layer, pruned: as of the method; `pruned` None: the first of its fates.
        device: as torch names it.
        dtype: one of `flags.DTYPES`; None: the checkpoint's.
        seed: of all draws.
        instruction: the policy's instruction; None: one of its training.
        options: for `load_policy`.
        details: whether every check is explained.
        json: file for the report, "-" for standard output, None for none.
        certificate: file for the certificate of this audit; None: none is written.
        compare: file with a certificate of another machine, with which this audit is compared; None: no comparison.
    """

    model: str
    random_weights: bool = False
    size: str | None = None
    method: str = "vla-pruner"
    keep: float | int = 0.25
    layer: int = 3
    pruned: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0
    instruction: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    details: bool = False
    json: str | None = None
    certificate: str | None = None
    compare: str | None = None


def run_audit(settings: AuditSettings, console: Console) -> int:
    """Audit, print the checklist and write the report; return the exit code: 0, or 1 if a check failed or the audit
    contradicts another machine's certificate.

    Raises:
        VLAPrunerError: the settings, the checkpoint or the policy do not allow an audit.
    """
    (made,) = methods_of(
        (settings.method,), (settings.keep,), (settings.layer,), settings.pruned and (settings.pruned,)
    )
    method: Method = made.method
    check_request(method, settings.instruction, settings.seed)
    device = usable_device(settings.device, "--device")
    if settings.json not in (None, "-"):
        check_file(str(settings.json))
    if settings.certificate is not None:
        check_file(settings.certificate, "--certificate")
    there = None if settings.compare is None else read_certificate(settings.compare)
    # Standard output is the report's alone if it was asked for; policies' own libraries print things, too.
    with redirect_stdout(sys.stderr) if settings.json == "-" else nullcontext():
        with waiting(console, f"loading {settings.model}"):
            policy = _policy(settings, device)
        report = audit(
            policy,
            method,
            instruction=settings.instruction,
            seed=settings.seed,
            progress=lambda check: print_check(console, check, settings.details),
        )
    say(console, summary(report), style="bold green" if report.passed else "bold red", soft_wrap=True)
    if settings.json is not None:
        _write(report, settings)
    same = True
    if settings.certificate is not None or there is not None:
        here = certificate(report, policy, settings.model)
        if settings.certificate is not None:
            _write_text(settings.certificate, here.to_json(), "--certificate")
        if there is not None:
            same = _compare(here, there, console)
    return 0 if report.passed and same else 1


def _compare(here: Certificate, there: Certificate, console: Console) -> bool:
    wrong, others = differences(here, there)
    for line in others:
        say(console, f"differs: {line}", soft_wrap=True)
    for line in wrong:
        say(console, f"WRONG: {line}", style="bold red", soft_wrap=True)
    if not wrong:
        say(console, "Nothing here contradicts that certificate.", style="bold green", soft_wrap=True)
    return not wrong


def _policy(settings: AuditSettings, device: torch.device) -> Policy:
    dtype = as_dtype(settings.dtype)
    if settings.random_weights:
        if settings.options:
            raise OptionError(f"--option is for checkpoints; with --random-weights leave it out: {settings.options}.")
        row = row_named(settings.model)
        if row is None or row.random is None:
            names = ", ".join(random_names())
            raise UnsupportedModelError(f"MODEL is {settings.model}; with random weights there are {names}.")
        size = settings.size or "tiny"
        return random_policy(settings.model, size, device, torch.float32 if dtype is None else dtype, settings.seed)
    if settings.size is not None:
        raise OptionError("--size is for --random-weights; a checkpoint has its own size.")
    try:
        return load_policy(settings.model, device, dtype, **settings.options)
    except CheckpointError as error:
        row = row_named(settings.model)
        if row is not None and row.random is not None:
            raise CheckpointError(f"{error} Without a checkpoint: --random-weights.") from error
        raise
    except NotImplementedError as error:
        raise UnsupportedModelError(f"{settings.model} asks for something that is not supported: {error}") from error


def _write(report: AuditReport, settings: AuditSettings) -> None:
    model = {"model": settings.model, "random_weights": settings.random_weights}
    if settings.random_weights:
        model["size"] = settings.size or "tiny"
    content = {**model, **report.to_json()}
    if settings.json == "-":
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        _write_text(str(settings.json), content, "--json")


def _write_text(name: str, content: dict[str, Any], flag: str) -> None:
    try:
        replace_file(Path(name), (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:  # a full disk, for instance
        raise unwritable(name, error, flag) from error
