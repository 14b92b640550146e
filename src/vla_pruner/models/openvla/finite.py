"""Numbers that are not finite never become an action: the most likely of such logits would be a valid token."""

from __future__ import annotations

from torch import Tensor, nn

from vla_pruner.checkpoints.numbers import no_action
from vla_pruner.errors import ObservationError

_NO_TOKEN = -1


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens of logits (..., V): ids (...) int64, and the same with -1 where a logit is not
    finite.

    Nothing waits for the device: `checked` looks at the second when it comes to the CPU.
    """
    highest, tokens = logits.max(dim=-1)
    # The highest is NaN if any logit is.
    return tokens, tokens.where(highest.isfinite(), _NO_TOKEN)


def checked(found: Tensor, module: nn.Module, **inputs: Tensor | None) -> Tensor:
    """Return `found` on the CPU if all of it is finite.

    Args:
        found: the network's output: numbers, or tokens as the second result of `most_likely`.
        module: the part of the network that computed it, for its dtype.
        inputs: the network's inputs by name; None: absent.

    Raises:
        ObservationError: it is not finite, and one of `inputs` neither.
        CheckpointError: it is not finite, though all of `inputs` are.
    """
    found = found.cpu()
    good = found.isfinite() if found.is_floating_point() else found != _NO_TOKEN
    if good.all():
        return found
    check_inputs(everywhere=True, **inputs)
    raise no_action(module)


def check_inputs(everywhere: bool = False, **inputs: Tensor | None) -> None:
    """Refuse inputs that are not finite, by name: before the network spends time on them, and before a session that
    prunes has to choose tokens by them.

    Args:
        everywhere: also check inputs on a device, which waits for it.

    Raises:
        ObservationError: one is not finite.
    """
    for name, value in inputs.items():
        if value is not None and (everywhere or value.device.type == "cpu") and not value.isfinite().all():
            raise ObservationError(f"{name} holds numbers that are not finite (NaN or infinity); give finite ones.")
