"""Subjects that take a second: tiny policies, ready to be benchmarked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vla_pruner.benching.feeds import feed
from vla_pruner.benching.policies import build
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.benching.subject import Subject

LLAMA = "llama:32,6,4,48,100"
MODELS = {
    "llama": BenchSettings(LLAMA, pruned=("drop", "freeze"), decode_tokens=3),
    "llama, two robots": BenchSettings(LLAMA, batch=2, prompt_tokens=270, decode_tokens=2),
    "openvla": BenchSettings("openvla-7b", size="tiny", pruned=("freeze",), decode_tokens=3),
    "oft": BenchSettings("openvla-oft", size="tiny", cameras=1),
    "pi0": BenchSettings("pi0", size="tiny", pruned=("freeze",), batch=2, denoise_steps=2),
    "llava": BenchSettings("llava", size="tiny", pruned=("freeze",), cameras=1, decode_tokens=3),
    "smolvlm": BenchSettings("smolvlm", size="tiny", batch=2, decode_tokens=2),
    "llava-next": BenchSettings("llava-next", size="tiny", cameras=1, decode_tokens=2),
    "internvl": BenchSettings("internvl", size="tiny", decode_tokens=2),
    "gemma3": BenchSettings("gemma3", size="tiny", decode_tokens=2),
    "paligemma2": BenchSettings("paligemma2", size="tiny", decode_tokens=2),
    "qwen2-vl": BenchSettings("qwen2-vl", size="tiny", decode_tokens=2),
    "reference": BenchSettings("reference", size="tiny", batch=2),
    "reference-chunk": BenchSettings("reference-chunk", size="tiny", pruned=("freeze",), batch=2),
}
CPU = torch.device("cpu")


def subject_of(settings: BenchSettings) -> Subject:
    """Return the subject that `bench` would time."""
    policy: Any = build(settings, CPU, torch.float32)
    return Subject(policy, feed(policy, settings, CPU), settings, CPU)


@pytest.fixture(scope="package", params=list(MODELS))
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(MODELS[request.param])


@pytest.fixture(scope="package")
def llama() -> Subject:
    return subject_of(MODELS["llama"])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No looking at the machine, and no repeating for the sake of exact figures."""
    from vla_pruner import conditions
    from vla_pruner.benching import measure, run
    from vla_pruner.benching.roofline import Peaks

    monkeypatch.setattr(run, "measure_peaks", lambda device, dtype: Peaks(1e11, 1e10))
    for module in (run, conditions):
        monkeypatch.setattr(module, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(run, "time_stages", lambda turns, rounds: measure.time_stages(turns, 1))
    monkeypatch.setattr(run, "preparation", lambda turns: measure.preparation(turns, 1))
    monkeypatch.setattr(run, "reachable_share", lambda turns, layer: measure.reachable_share(turns, layer, 1))
