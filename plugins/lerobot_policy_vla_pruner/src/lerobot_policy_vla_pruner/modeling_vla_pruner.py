"""The policy type `vla_pruner`: a checkpoint's own policy with a method attached, behind LeRobot's interface."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from lerobot_policy_vla_pruner.configuration_vla_pruner import NOT_TRAINED, VLAPrunerConfig
from vla_pruner.checkpoints.files import checkpoint_folder
from vla_pruner.errors import CheckpointError, UnsupportedModelError
from vla_pruner.policies.lerobot import check_kind, load_module, read_config
from vla_pruner.policies.lerobot_processors import check_steps


class VLAPrunerPolicy(PreTrainedPolicy):
    """Calls go to `inner`, the checkpoint's policy; `session` is the session attached to it.

    Raises:
        CheckpointError: no checkpoint was named, or it does not load whole.
    """

    config_class = VLAPrunerConfig
    name = "vla_pruner"

    def __init__(self, config: VLAPrunerConfig, inner: nn.Module | None = None, **_: Any) -> None:
        super().__init__(config)
        if inner is None:
            raise CheckpointError(
                "No checkpoint was named: give --policy.pretrained_path=FOLDER or an id on the hub (not --policy.path, "
                "which reads the type from the checkpoint itself)."
            )
        self.inner: Any = inner
        self.session = config.build_method().attach(inner)
        logging.info("vla-pruner: attached %s to %s", self.session.method, type(inner).__name__)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: VLAPrunerConfig,
        revision: str | None = None,
        **_: Any,
    ) -> VLAPrunerPolicy:
        """Load the checkpoint's policy whole, with the method of `config` attached."""
        if revision is not None:
            raise CheckpointError(
                "pretrained_revision was given, but LeRobot 0.6 takes pi0's weights from the newest revision all the "
                "same; download the revision and name its folder."
            )
        folder = checkpoint_folder(pretrained_name_or_path)
        check_kind(folder)
        # LeRobot's tools load the policy before its processors, and would run what those name.
        flag = "--policy.trust_processors=true"
        check_steps(folder, config.trust_processors, flag=flag)
        own = read_config(folder, config.inner_flags())
        if config.output_features:
            own.output_features = config.output_features
        inner = load_module(folder, own, config.device or "cpu", trust=config.trust_processors, flag=flag)
        config.input_features, config.output_features = own.input_features, own.output_features
        return cls(config, inner)

    def reset(self) -> None:
        """Begin a new episode, for the policy and for the session."""
        self.inner.reset()

    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """See `inner`."""
        return self.inner.select_action(batch, **kwargs)

    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """See `inner`."""
        return self.inner.predict_action_chunk(batch, **kwargs)

    def forward(self, batch: dict[str, Tensor], **kwargs: Any) -> Any:
        """Refuse: it is the loss."""
        raise UnsupportedModelError(NOT_TRAINED)

    def get_optim_params(self) -> dict[str, Any]:
        """Refuse."""
        raise UnsupportedModelError(NOT_TRAINED)

    def _save_pretrained(self, save_directory: Path, state_dict: Any = None) -> None:
        raise UnsupportedModelError("A pruned policy has no weights of its own to save; save its `inner`.")
