"""The share of a control step that pruning can touch at all, on this device."""

from __future__ import annotations

import statistics
from time import perf_counter

import torch

from vla_pruner.accelerators import name_of, now
from vla_pruner.anatomy import layers_of
from vla_pruner.auditing.report import Check
from vla_pruner.auditing.subject import Subject
from vla_pruner.timing import Span
from vla_pruner.wording import counted, span

WARM_UP, LEAST, MOST, SECONDS = 2, 3, 9, 10.0
"""Control steps that do not count; those that do, at least and at most; seconds after which measuring ends."""


def share(subject: Subject) -> Check:
    """Amdahl's limit: the time of the decoder's layers from the pruning layer on, in the prompt alone, against that of
    the whole control step.
    """
    name, layer = "share", subject.method.layer
    if subject.steps is None:
        return Check(name, None, "", f"{type(subject.method).__name__} prunes nothing.")
    with subject.attach() as session:
        found = subject.run(session, list(range(subject.steps)))
    subject.begin()
    images, totals, spans = subject.scene(0), [], []
    begun = perf_counter()
    for repeat in range(WARM_UP + MOST):
        probe = Span(subject.family.decoder, layer, subject.device)
        with probe:
            start = now(subject.device)
            subject.act(images)
            total = now(subject.device) - start
        if repeat >= WARM_UP:
            totals.append(total)
            spans.append(probe.seconds)
            if len(totals) >= LEAST and perf_counter() - begun > SECONDS:
                break
    total, deep = statistics.median(totals), statistics.median(spans)
    if found is None or not 0 < deep < total:
        return Check(name, False, "", "The layers from the pruning layer on took no time, or more than the whole step.")
    part = deep / total
    layout = found.layout
    gone = (layout.tokens - found.kept.shape[1]) / layout.length
    figure = (
        f"{part:.0%} of {1e3 * total:.1f} ms; at most {1 / (1 - part * gone):.2f}x faster at this keep, "
        f"{1 / (1 - part):.2f}x if these layers were free"
    )
    depth = len(layers_of(subject.family.decoder))
    before = f"{span('layer', 0, layer)}, " if layer else ""
    detail = (
        f"The prompt in decoder {span('layer', layer, depth - layer)}, unpruned, medians of {len(totals)} steps on "
        f"{describe_device(subject.device)}. Pruning takes {gone:.0%} of the prompt's positions out of these layers. "
        "This is a ceiling for every method at this layer, where time goes with the number of positions; no method "
        f"gains on the rest: vision, {before}decoding or denoising, and what a method costs itself."
    )
    return Check(name, True, figure, detail)


def describe_device(device: torch.device) -> str:
    """Return the device in words."""
    if device.type == "cpu":
        return f"cpu ({counted(torch.get_num_threads(), 'thread')})"
    return name_of(device) or str(device)
