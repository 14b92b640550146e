"""The audit itself: every check on one policy, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter

from vla_pruner.auditing import pruning, seeing, state
from vla_pruner.auditing.environment import environment, settings
from vla_pruner.auditing.position import position
from vla_pruner.auditing.report import AuditReport, Check
from vla_pruner.auditing.share import share
from vla_pruner.auditing.subject import Subject
from vla_pruner.fate import Fate
from vla_pruner.methods import Method, VLAPruner
from vla_pruner.policies.base import Policy

CHECKS: dict[str, Callable[[Subject], Check]] = {
    "environment": environment,
    "repeatable": seeing.repeatable,
    "images": seeing.images,
    "cameras": seeing.cameras,
    "vision towers": seeing.towers,
    "lengths": pruning.lengths,
    "keep 1.0": pruning.keep_all,
    "reference drop": partial(pruning.reference, pruned=Fate.DROP),
    "reference freeze": partial(pruning.reference, pruned=Fate.FREEZE),
    "scenes": pruning.scenes,
    "position": position,
    "reset": state.reset,
    "detach": state.detach,
    "share": share,
}
"""Every check, by its name."""


def audit(
    policy: Policy,
    method: Method | None = None,
    *,
    instruction: str | None = None,
    seed: int = 0,
    progress: Callable[[Check], None] | None = None,
) -> AuditReport:
    """Check that the policy sees, that the method prunes what it says, and that nothing else changes.

    It runs the policy some hundred control steps on drawn images, and leaves it as it was.

    Args:
        policy: from `load_policy` or `random_policy`, or any `policies.base.Policy`, with no session attached.
        method: the method that prunes it; None: `VLAPruner(keep=0.25)`.
        instruction: the policy's instruction; None: one of its training, or a usual one.
        seed: of the images, and of the noise that flow policies start from.
        progress: called with each check as soon as it is done.

    Raises:
        UnsupportedModelError: the policy cannot be audited or pruned.
        OptionError: `method` is no `Method` or does not fit the policy, or `seed` is negative.
        ObservationError: the instruction is empty, or not one for this policy.
        SessionError: a session is attached to it already.
    """
    begun = perf_counter()
    subject = Subject(policy, VLAPruner(keep=0.25) if method is None else method, instruction, seed)
    done = []
    for name, ask in CHECKS.items():
        before = subject.acted
        try:
            check = ask(subject)
        except Exception as error:  # any error that a policy raises half-way is a finding about it
            text = " ".join(str(error).split())
            check = Check(name, False, "", f"It broke off with {type(error).__name__}: {text}")
        check = replace(check, observations=subject.acted - before)
        done.append(check)
        if progress is not None:
            progress(check)
    return AuditReport(
        policy=type(policy).__name__,
        method=repr(subject.method),
        settings={**settings(subject), "seconds": round(perf_counter() - begun, 1)},
        checks=tuple(done),
    )
