"""Adapters that look like those of PEFT, which most environments lack."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class BaseTunerLayer(nn.Module):
    """A linear layer to whose output an adapter adds, unless it is turned off."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.scaling = layer, {"default": 1.0}
        self.disable_adapters, self.active_adapters = False, ["default"]

    def forward(self, hidden: Tensor) -> Tensor:
        result = self.base_layer(hidden)
        return result if self.disable_adapters else result + self.scaling["default"] * result.flip(-1)


CHANGES = ("put in", "turned off", "turned on", "scaled", "taken out")


def change_adapters(layers: Any, change: str | None) -> None:
    """Make one of `CHANGES` to the first linear layer of each of `layers`; None: none."""
    for layer in layers:
        kinds = (nn.Linear, BaseTunerLayer)
        name = next(name for name, module in layer.named_modules() if isinstance(module, kinds))
        parent, _, attribute = name.rpartition(".")
        owner = layer.get_submodule(parent)
        module: Any = getattr(owner, attribute)
        if change == "put in":
            setattr(owner, attribute, BaseTunerLayer(module))
        elif change in ("turned off", "turned on"):
            module.disable_adapters = change == "turned off"
        elif change == "scaled":
            module.scaling = {"default": 0.5}
        elif change == "taken out":
            setattr(owner, attribute, module.base_layer)
