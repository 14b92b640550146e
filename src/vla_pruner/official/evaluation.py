"""The evaluation of a script: the policy that its configuration names, with a method attached, and its counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vla_pruner.attach.session import Session
from vla_pruner.errors import ObservationError, OptionError, SessionError, UnsupportedModelError
from vla_pruner.methods import Method
from vla_pruner.models.openvla import OpenVLAForActionPrediction, OpenVLAOFT
from vla_pruner.policies.loading import load_policy
from vla_pruner.preprocessing.libero import center_crop
from vla_pruner.wording import a_type, counted

IMAGE_SIZE = 224
HEADS = ("action_head", "proprio_projector", "noisy_action_projector")


class OfficialModel:
    """A policy as the official scripts hold it: the policy's attributes, and `predict_action` as in the original.

    Args:
        policy: OpenVLA or OpenVLA-OFT.
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __getattr__(self, name: str) -> Any:
        if name == "policy":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.policy, name)

    def predict_action(self, *args: Any, **kwargs: Any) -> Any:
        """Call the policy's `predict_action`. For OFT, whose original returns hidden states beside the actions, return
        the pair of the actions and None.
        """
        found = self.policy.predict_action(*args, **kwargs)
        return (found, None) if isinstance(self.policy, OpenVLAOFT) else found


class Evaluation:
    """The policy of one run of a script.

    Args:
        method: the method to attach to the policy; None: no method.
        policy: a policy that is already loaded; None: the policy that the script's configuration names.
        options: for `load_policy`; they override the configuration.

    Attributes:
        model: the model that the script holds; None until it was loaded.
        session: the method's session; None until the model was loaded, or without a method.
        episodes, steps, pruned: episodes begun, control steps taken, and control steps with fewer visual tokens.
        kept: visual tokens kept in the last pruned control step.
    """

    def __init__(self, method: Method | None, policy: Any, options: Mapping[str, Any]) -> None:
        self.method = method
        self.model: OfficialModel | None = None
        self.session: Session | None = None
        self.episodes = self.steps = self.pruned = self.kept = 0
        self._given = policy
        self._options = dict(options)
        self._fresh = False

    def load(self, cfg: Any) -> OfficialModel:
        """Load the policy that a script's configuration names, and attach the method.

        Raises:
            OptionError: the configuration does not describe the policy.
            UnsupportedModelError: the policy is neither OpenVLA nor OpenVLA-OFT.
            VLAPrunerError: as of `load_policy` and `attach`.
        """
        check_family(cfg)
        self.close()
        policy = self._given
        if policy is None:
            policy = load_policy(cfg.pretrained_checkpoint, **self._loading(cfg))
        if not isinstance(policy, OpenVLAForActionPrediction):
            raise UnsupportedModelError(
                f"The official scripts evaluate OpenVLA and OpenVLA-OFT; found {a_type(policy)}. Evaluate it with "
                "`vla-pruner eval`."
            )
        _check_described(cfg, policy)
        self.session = None if self.method is None else self.method.attach(policy)
        self.model = OfficialModel(policy)
        return self.model

    def _loading(self, cfg: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
        if getattr(cfg, "load_in_8bit", False):
            options["quantization"] = "int8"
        if getattr(cfg, "load_in_4bit", False):
            options["quantization"] = "int4"
        if getattr(cfg, "use_diffusion", False):
            options["denoising_steps"] = cfg.num_diffusion_steps_inference
        return options | self._options

    @property
    def policy(self) -> Any:
        """The policy that `load` returned.

        Raises:
            SessionError: `load` was not called yet.
        """
        if self.model is None:
            raise SessionError("No model is loaded; call get_model(cfg) first, as the official scripts do.")
        return self.model.policy

    def begin_episode(self) -> None:
        """Begin an episode: an environment was reset."""
        self._fresh = True
        if self.model is not None:
            self.model.policy.reset()

    def act(
        self, cfg: Any, model: Any, observation: Mapping[str, Any], instruction: str, heads: Mapping[str, Any]
    ) -> Any:
        """Run one control step.

        Args:
            cfg: the script's configuration: `center_crop` and `unnorm_key`.
            model: the model that `load` returned.
            observation: "full_image" and, for OFT, images with "wrist" in their names, (224, 224, 3) uint8, upright;
                "state" in its own units.
            instruction: the task in words.
            heads: OFT's modules by name; the policy's own, or None.

        Returns:
            (7,) for openvla's script, and a list of the chunk's actions for OFT's.

        Raises:
            SessionError: it is another model, the method was detached, or no environment was reset yet.
            ObservationError: the images or heads are not the policy's, or the policy's `act` raises it.
        """
        policy = self.policy
        if model is not self.model:
            raise SessionError(f"get_action was given {a_type(model)} that get_model did not return.")
        if self.session is not None and not self.session.attached:
            raise SessionError(
                "The method was detached while the script runs, so further control steps would be counted as pruned "
                "and are not; call get_model(cfg) again, or leave the detaching to remove()."
            )
        if not self.episodes and not self._fresh:
            raise SessionError(
                "get_action was called before any environment was reset, so the policy would not know where an episode "
                "begins: make the environment with LIBERO's OffScreenRenderEnv and reset it first."
            )
        for name, head in heads.items():
            if head is not None and head is not getattr(policy, name, None):
                raise ObservationError(f"{name} is none of the policy's own; take it from get_{name}.")
        images = [observation["full_image"]]
        if len(policy.cameras) > 1:
            images += [observation[name] for name in observation if "wrist" in name]
        if len(images) != len(policy.cameras):
            raise ObservationError(
                f"The observation has {counted(len(images), 'image')}; the policy's cameras are "
                f"{', '.join(policy.cameras)}."
            )
        if cfg.center_crop:
            images = [center_crop(image) for image in images]
        actions = policy.act(
            dict(zip(policy.cameras, images, strict=True)),
            instruction,
            None if policy.proprio_size is None else np.asarray(observation["state"]),
            unnorm_key=getattr(cfg, "unnorm_key", None) or None,
        )
        self._count()
        return list(actions) if is_oft(cfg) else actions[0]

    def _count(self) -> None:
        self.episodes += self._fresh
        self._fresh = False
        self.steps += 1
        kept = None if self.session is None else self.session.kept
        if kept is not None:
            self.pruned += 1
            self.kept = kept.shape[1]

    def summary(self) -> str:
        """Return the counts in one line."""
        told = f"{counted(self.episodes, 'episode')}, {counted(self.steps, 'control step')}"
        if self.method is None:
            return f"{told}, unpruned"
        if not self.pruned:
            return f"{told}, none of them pruned"
        visual = self.policy.patches * len(self.policy.cameras)
        return f"{told}, {self.pruned} of them pruned (the last to {self.kept} of {visual} visual tokens)"

    def close(self) -> None:
        """Detach the method."""
        if self.session is not None:
            self.session.detach()


def is_oft(cfg: Any) -> bool:
    """Return True if a configuration is that of OFT's script, which takes chunks."""
    return hasattr(cfg, "num_images_in_input")


def check_family(cfg: Any) -> None:
    """Refuse configurations of other models.

    Raises:
        UnsupportedModelError: `cfg.model_family` is not "openvla".
    """
    family = getattr(cfg, "model_family", "openvla")
    if family != "openvla":
        raise UnsupportedModelError(f"model_family={family!r} was given; vla_pruner.official evaluates 'openvla'.")


def _check_described(cfg: Any, policy: Any) -> None:
    """Raise OptionError if the script's configuration does not describe the policy."""
    if not is_oft(cfg):
        if isinstance(policy, OpenVLAOFT):
            raise OptionError(
                "The checkpoint is OpenVLA-OFT's, and this script takes one action at a time: evaluate it with "
                "openvla-oft's run_libero_eval.py."
            )
        return
    diffusion = bool(getattr(policy, "diffusion", False))
    facts = {
        "use_film": False,
        "num_images_in_input": len(policy.cameras),
        "use_proprio": policy.proprio_size is not None,
        "use_diffusion": diffusion,
        "use_l1_regression": getattr(policy, "action_head", None) is not None and not diffusion,
    }
    wrong = [f"{name}={getattr(cfg, name)!r}" for name in facts if getattr(cfg, name, facts[name]) != facts[name]]
    if wrong:
        needed = ", ".join(f"--{name} {value}" for name, value in facts.items())
        raise OptionError(f"The script was given {', '.join(wrong)}, and the checkpoint needs: {needed}.")
    chunk, queue = getattr(policy, "chunk", 1), getattr(cfg, "num_open_loop_steps", None)
    if queue is not None and queue < chunk:
        raise OptionError(
            f"num_open_loop_steps={queue} was given, and the script's queue would lose the first {chunk - queue} of "
            f"the chunk's {chunk} actions: give --num_open_loop_steps {chunk}."
        )
