"""Tiny policies on any device: control steps that differ by their scene, and the result of a step as one tensor."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import vla_pruner as vp
from vla_pruner.benching.feeds import feed
from vla_pruner.benching.policies import build
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.families import family_of

LLAMA = "llama:64,4,4,96,512"
MODELS = {
    "llama": BenchSettings(LLAMA, decode_tokens=2, batch=2),
    "openvla": BenchSettings("openvla-7b", size="tiny", decode_tokens=3),
    "oft": BenchSettings("openvla-oft", size="tiny"),
    "pi0": BenchSettings("pi0", size="tiny", cameras=2, denoise_steps=2),
    "reference": BenchSettings("reference", size="tiny", batch=2),
    "reference-chunk": BenchSettings("reference-chunk", size="tiny"),
}
CONTINUOUS = ("oft", "pi0", "reference-chunk")
"""Policies whose actions are not tokens."""


@dataclass
class Subject:
    """A policy with one control step per scene.

    Attributes:
        name: a name of `MODELS`.
        policy: the policy to which methods attach.
        device: the policy's device.
        steps: control steps of scenes that look different.
        options: options of the family for `attach`.
    """

    name: str
    policy: Any
    device: torch.device
    steps: list[Callable[[], Any]]
    options: dict[str, Any]

    @property
    def family(self) -> Any:
        """A new adapter of the policy."""
        return family_of(self.policy, **self.options)

    def attach(self, method: vp.Method, **more: Any) -> vp.Session:
        """Attach a method to the policy; `more` options of `attach`."""
        return method.attach(self.policy, **more, **self.options)

    def result(self, scene: int) -> Tensor:
        """Run the control step of a scene, and return (n,) float32 on the CPU: the last row of its first prompt after
        the decoder, and the actions if they are numbers and not tokens.
        """
        seen: list[Tensor] = []
        handle = self.family.decoder.norm.register_forward_hook(lambda _, __, hidden: seen.append(hidden[:, -1]))
        try:
            actions = self.steps[scene]()
        finally:
            handle.remove()
        parts = [seen[0].float().cpu().flatten()]
        if self.name in CONTINUOUS:
            parts.append(torch.as_tensor(actions).float().cpu().flatten())
        return torch.cat(parts)


def subject(name: str, device: str, dtype: torch.dtype = torch.float32, scenes: int = 4) -> Subject:
    """Build a tiny policy with random weights on the device."""
    settings = replace(MODELS[name], device=device, dtype=str(dtype).removeprefix("torch."))
    place = torch.device(device)
    policy = build(settings, place, dtype)
    feeds = [feed(policy, replace(settings, seed=seed), place) for seed in range(scenes)]
    return Subject(name, policy, place, [one.step for one in feeds], feeds[0].attach)


@contextmanager
def _cuda_waits_for_nothing() -> Any:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def waits_for_nothing(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which any wait of the host for a GPU raises RuntimeError; the host never waits for a CPU."""
    return _cuda_waits_for_nothing() if device.type == "cuda" else nullcontext()


def memory_in_use(device: torch.device) -> int:
    """Return the bytes of live tensors: on a GPU all that torch has allocated, on a CPU those that Python tracks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    stored = {}
    for one in gc.get_objects():
        if type(one) in (Tensor, torch.nn.Parameter):
            storage = one.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
    return sum(stored.values())
