"""Numbers that are not finite never become an action: the most likely of such logits would be a valid token."""

from __future__ import annotations

from torch import Tensor, nn

from vla_pruner.checkpoints.numbers import no_action
from vla_pruner.errors import ObservationError

_NO_TOKEN = -1


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely tokens of logits (..., V): ids (...) int64, and the same with -1 where no logit can be believed.

    Nothing waits for the device: `checked` looks at the second when it comes to the CPU.
    """
    highest, tokens = logits.max(dim=-1)
    # The highest is NaN if any logit is.
    return tokens, tokens.where(highest.isfinite(), _NO_TOKEN)


def checked(found: Tensor, module: nn.Module, **inputs: Tensor | None) -> Tensor:
    """`found` on the CPU, if all of it is finite.

    Args:
        found: what the network gave: numbers, or tokens as the second result of `most_likely`.
        module: the part of the network that gave it, for its dtype.
        inputs: what the network was given, by name; None: nothing.

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
        everywhere: look at those on a device too, which is a wait.

    Raises:
        ObservationError: one is not finite.
    """
    for name, value in inputs.items():
        if value is not None and (everywhere or value.device.type == "cpu") and not value.isfinite().all():
            raise ObservationError(f"{name} holds numbers that are not finite (NaN or infinity); give finite ones.")
