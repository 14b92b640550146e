"""How long the parts of a control step took, for every reply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vla_pruner.attach.family import Family
from vla_pruner.policies.base import Policy, module_of
from vla_pruner.timing import StageTimer, Watched, always, prefill_or_decode

_PROJECTORS = ("projector", "multi_modal_projector", "connector")


class StepTimer(StageTimer):
    """A stage timer that also knows when the first stage of a step began, and keeps no more than the last step."""

    def __init__(self, policy: Policy, family: Family) -> None:
        super().__init__(policy, watched_of(policy, family))
        self._first: float | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """As of `StageTimer`."""
        if self._first is None:
            self._first = self._read()
        with super().stage(name):
            yield

    @contextmanager
    def step(self) -> Iterator[None]:
        """As of `StageTimer`."""
        self.steps.clear()
        self._first = None
        with super().step():
            self._start = self._read()
            yield

    def timing(self) -> dict[str, float]:
        """Milliseconds of the last step, by the names that replies have."""
        step = self.steps[-1]
        before = 0.0 if self._first is None else self._first - self._start
        return {
            "infer_ms": step.total,
            "preprocess_ms": 1e3 * before,
            "vision_ms": step.vision,
            "prune_ms": step.pruning,
            "prefill_ms": step.prefill,
            "action_ms": step.decode,
        }


def watched_of(policy: Policy, family: Family) -> Watched:
    """Which modules of a policy are which stage."""
    module: Any = module_of(policy)
    projectors = [part for name, part in module.named_modules() if name.rpartition(".")[2] in _PROJECTORS]
    seen = [(part, always("vision")) for part in (*policy.vision_towers, *projectors)]
    both: Any = getattr(family, "both", None)
    if both is not None:  # SmolVLA computes decoder and expert in one module
        return [*seen, (both, _prefix_or_suffix)]
    owners = [part for part in module.modules() if getattr(part, "model", None) is family.decoder]
    head = next((part for part in owners if hasattr(part, "lm_head")), family.decoder)
    return [*seen, (head, prefill_or_decode), *((reader, always("decode")) for reader in family.readers)]


def _prefix_or_suffix(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    inputs = kwargs.get("inputs_embeds")
    return "decode" if inputs is not None and inputs[0] is None else "prefill"
