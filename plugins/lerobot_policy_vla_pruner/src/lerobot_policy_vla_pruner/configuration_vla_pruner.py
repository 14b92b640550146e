"""The flags of the policy type `vla_pruner`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig

from vla_pruner.errors import OptionError, UnsupportedModelError, VLAPrunerError

UNPRUNED = ("unpruned", "none")
"""The method without a budget, here and in vla-pruner's own commands: a session that keeps everything."""

NOT_TRAINED = "A pruned policy is not trained; train the checkpoint itself."


class FlagError(VLAPrunerError):
    """The flags describe no method. It is no ValueError, of which LeRobot's parser would not show the words."""


@PreTrainedConfig.register_subclass("vla_pruner")
@dataclass
class VLAPrunerConfig(PreTrainedConfig):
    """A checkpoint, named by `pretrained_path`, and how it is pruned: pi0, pi0.5, pi0-FAST, SmolVLA, MolmoAct2, EO-1 or
    VLA-JEPA.

    Attributes:
        method: as --method of vla-pruner's own commands: a name such as "vla_pruner" or "fastv", one of an installed
            plug-in, or "my_module:MyMethod", each with options after colons if wanted; or "unpruned" ("none").
        keep: a fraction with a point (0.25), a number of tokens (64), or a mapping of camera names to these; None:
            0.25, or the published one of a method that reuses tokens.
        layer: as of vla-pruner's methods.
        pruned: "drop", "freeze" or "reuse"; None: as the method has it by default (VLAPruner freezes).
        options: further options of the method, such as {"warmup": "semantic"}; they win over those in `method`.
        inner: fields of the checkpoint's own config that are to differ, such as {"n_action_steps": 10}.
        trust_processors: let the checkpoint's processors name steps that are not LeRobot's own, which runs their code.

    Raises:
        FlagError: they describe no method of vla-pruner.
    """

    method: str = "vla_pruner"
    keep: Any = None
    layer: int = 3
    pruned: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    inner: dict[str, Any] = field(default_factory=dict)
    trust_processors: bool = False

    def __post_init__(self) -> None:
        # Wrong flags are reported before LeRobot makes environments and reads gigabytes.
        try:
            self.build_method()
        except VLAPrunerError as error:
            raise FlagError(str(error)) from error
        super().__post_init__()

    def build_method(self) -> Any:
        """Return the method of vla-pruner that these flags describe.

        Raises:
            OptionError: there is no such method or option, or one is out of its range; or it prunes by how far the arm
                moves, which LeRobot's loop does not report.
            PluginError: a method from outside of vla-pruner cannot be imported.
        """
        from vla_pruner.method_names import methods_of
        from vla_pruner.methods import Unpruned

        if self.method in UNPRUNED:
            made: Any = Unpruned(layer=self.layer, pruned=self.pruned or "drop")
        else:
            keep, pruned = ([] if one is None else [one] for one in (self.keep, self.pruned))
            (named,) = methods_of([self.method], keep or None, [self.layer], pruned or None)
            made = named.method
        try:
            made = dataclasses.replace(made, **self.options)
        except TypeError as error:
            raise OptionError(f"options={self.options!r} were given; method {self.method!r}: {error}.") from error
        if made.motion:
            raise OptionError(
                f"method={self.method!r} with these options prunes by how far the arm moves, which nothing in "
                "LeRobot's loop tells it; leave its gate out."
            )
        return made

    def inner_flags(self) -> list[str]:
        """Return `inner` as flags of the checkpoint's config."""
        return [f"--{name}={value}" for name, value in self.inner.items()]

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        raise UnsupportedModelError(NOT_TRAINED)

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """Do nothing: the checkpoint's own config does it."""
