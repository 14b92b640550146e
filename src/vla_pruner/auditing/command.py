"""`vla-pruner audit`: settings checked first, then the policy, the audit, the checklist and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from vla_pruner.auditing.certificate import Certificate, certificate, differences, read_certificate
from vla_pruner.auditing.report import AuditReport
from vla_pruner.auditing.run import audit
from vla_pruner.auditing.subject import check_request
from vla_pruner.auditing.table import print_check, summary
from vla_pruner.method_names import methods_of
from vla_pruner.methods import Method
from vla_pruner.outputs import check_file, check_output, left_to, write_file, write_output
from vla_pruner.policies.asked import asked_policy
from vla_pruner.policies.options import usable_device
from vla_pruner.terminal import say, waiting


@dataclass(frozen=True)
class AuditSettings:
    """The settings of the command line.

    Attributes:
        model: a folder, a hub id, "reference", or with `random_weights` a name of `vla_pruner.registry`.
        random_weights: whether weights are drawn.
        size: "tiny" or "full", with `random_weights`; None: "tiny".
        method: its name, with options of its own after colons.
        keep, layer, pruned: as of the method; `pruned` None: as the method has it by default.
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
    usable_device(settings.device, "--device")
    check_output(settings.json)
    if settings.certificate is not None:
        check_file(settings.certificate, "--certificate")
    there = None if settings.compare is None else read_certificate(settings.compare)
    with left_to(settings.json):
        with waiting(console, f"loading {settings.model}"):
            policy = asked_policy(
                settings.model,
                random_weights=settings.random_weights,
                size=settings.size,
                device=settings.device,
                dtype=settings.dtype,
                options=settings.options,
                seed=settings.seed,
            )
        report = audit(
            policy,
            method,
            instruction=settings.instruction,
            seed=settings.seed,
            progress=lambda check: print_check(console, check, settings.details),
        )
    say(console, summary(report), style="bold green" if report.passed else "bold red", soft_wrap=True)
    if settings.json is not None:
        write_output(settings.json, _text(_content(report, settings)))
    same = True
    if settings.certificate is not None or there is not None:
        here = certificate(report, policy, settings.model)
        if settings.certificate is not None:
            write_file(settings.certificate, _text(here.to_json()), "--certificate")
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


def _content(report: AuditReport, settings: AuditSettings) -> dict[str, Any]:
    model = {"model": settings.model, "random_weights": settings.random_weights}
    if settings.random_weights:
        model["size"] = settings.size or "tiny"
    return {**model, **report.to_json()}


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
