"""OpenVLA-OFT: one bidirectional pass gives a whole chunk of actions.

Facts from the official code (modeling_prismatic.py of openvla-oft and its fork of transformers), checked against golden
outputs of it. Three things differ: batches; attention that is bidirectional with every backend and every padding,
because the mask says so; and a denoising state in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_pruner.errors import ObservationError
from vla_pruner.models.openvla import actions
from vla_pruner.models.openvla.configuration import OpenVLAConfig
from vla_pruner.models.openvla.finite import check_inputs, checked, most_likely
from vla_pruner.models.openvla.heads import (
    DDIM,
    DiffusionActionHead,
    L1ActionHead,
    NoisyActionProjector,
    ProprioProjector,
)
from vla_pruner.models.openvla.network import OpenVLAForActionPrediction, moved, real_positions
from vla_pruner.models.openvla.prompt import Prompt, read_prompt
from vla_pruner.observations import array_of

PLACEHOLDER, STOP = 1, 2
"""Token ids: the placeholder of an action (its embedding is zeroed), and the end of the sequence."""


class OpenVLAOFT(OpenVLAForActionPrediction):
    """OpenVLA-OFT.

    The sequence is [BOS][visual tokens of each camera][state][diffusion timestep][rest of the prompt][placeholders]
    [stop]; state and timestep only if the policy has a proprio projector and a diffusion head. There is one placeholder
    for each number of the chunk, but the rows that act are one to the left: from the last token of the prompt to the
    last placeholder but one. With a diffusion head the language model runs once for each denoising step, on the same
    visual tokens; the vision towers run once in any case.

    Attributes:
        action_head: `L1ActionHead`, `DiffusionActionHead`, or None for discrete actions (tokens, all at once).
        proprio_projector: makes a token of the robot's state, or None.
        noisy_action_projector: makes tokens of noisy actions, for the diffusion head; else None.
        chunk: actions in a chunk.
        action_dim: numbers in an action.
        bounds: which statistics scale actions and states: "q99", or "minmax" for ALOHA.
        ddim: the sampler of the diffusion head.
    """

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        self.action_head: L1ActionHead | DiffusionActionHead | None = None
        self.proprio_projector: ProprioProjector | None = None
        self.noisy_action_projector: NoisyActionProjector | None = None
        self.chunk, self.action_dim = 8, 7
        self.bounds: actions.Bounds = "q99"
        self.ddim = DDIM(num_train_steps=50, num_inference_steps=50)

    @property
    def proprio_size(self) -> int | None:
        """The number of values in the robot's state that `act` takes; None: it takes none."""
        return None if self.proprio_projector is None else self.proprio_projector.proprio_dim

    @property
    def action_size(self) -> int:
        """Numbers in an action."""
        return self.action_dim

    @property
    def num_images_in_input(self) -> int:
        """Number of cameras."""
        return len(self.cameras)

    @property
    def action_tokens(self) -> int:
        """Number of placeholders, and of rows that act."""
        return self.chunk * self.action_dim

    @property
    def diffusion(self) -> bool:
        """True if actions are denoised."""
        return isinstance(self.action_head, DiffusionActionHead)

    def action_rows(self, attention_mask: Tensor) -> Tensor:
        """Return the rows that act.

        Args:
            attention_mask: (B, T), nonzero for the real tokens of the text: the prompt with 29871 at its end.

        Returns:
            (B, chunk * dim) int64 positions in the language model's sequence.
        """
        before = self.visual_slice.stop - 1 + (self.proprio_projector is not None) + self.diffusion
        last = (attention_mask != 0).sum(dim=1, keepdim=True) - 1
        return before + last + torch.arange(self.action_tokens, device=attention_mask.device)

    def rows_in_sequence(self, real: Tensor) -> Tensor:
        """Return `action_rows` from (B, S) `real`: False where the language model's whole sequence is padding."""
        last_prompt_token = real.sum(dim=1, keepdim=True) - self.action_tokens - 2
        return last_prompt_token + torch.arange(self.action_tokens, device=real.device)

    @torch.no_grad()
    def predict_action(  # pyright: ignore[reportIncompatibleMethodOverride] the two original calls differ
        self,
        input_ids: Tensor,
        unnorm_key: str | None = None,
        proprio: Any = None,
        proprio_projector: nn.Module | None = None,
        action_head: nn.Module | None = None,
        noisy_action_projector: nn.Module | None = None,
        use_film: bool = False,
        *,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        noise: Tensor | None = None,
    ) -> np.ndarray:
        """Return a chunk of actions, in the units of the dataset.

        The original returns a pair, and official scripts write `actions, _ = vla.predict_action(...)`; here it is the
        array alone, so write `actions = vla.predict_action(...)`. (Unpacked, a chunk of eight raises ValueError, but a
        chunk or a batch of two would silently be taken apart.)

        Args:
            input_ids: (B, T) token ids, padded on either side. Token 29871 is appended if it is not last.
            unnorm_key: dataset whose statistics scale the actions; None only if there is one, or the loader chose.
            proprio: (dim,) or (B, dim) the robot's state, normalised (`normalize_proprio`) as the original takes it;
                needed if and only if the policy has a proprio projector. `act` takes it in its own units.
            proprio_projector, action_head, noisy_action_projector: accepted for scripts that pass them; they can only
                be the policy's own.
            use_film: only False.
            pixel_values: (B, 6 * cameras, 224, 224), for each camera DINOv2's three channels and then SigLIP's.
            attention_mask: (B, T), nonzero for real tokens; None: padding tokens are padding.
            do_sample: only False.
            noise: (B, chunk, dim) that denoising starts from; drawn from torch's generator if None.

        Returns:
            (chunk, dim) float64; (B, chunk, dim) for more than one row.

        Raises:
            ObservationError: an argument does not fit; the message says which.
            CheckpointError: the network gives numbers that are not finite, or the statistics do not fit.
        """
        given = {
            "proprio_projector": proprio_projector,
            "action_head": action_head,
            "noisy_action_projector": noisy_action_projector,
        }
        for name, module in given.items():
            if module is not None and module is not getattr(self, name):
                raise ObservationError(
                    f"{name} was given, but the policy uses the one it was loaded with; leave it out."
                )
        if do_sample:
            raise ObservationError("do_sample=True was given; nothing is sampled here, so give do_sample=False.")
        if use_film:
            raise ObservationError("use_film=True was given; FiLM is not supported, so give use_film=False.")
        stats = self.get_action_stats(unnorm_key)
        if self.get_action_dim(unnorm_key) != self.action_dim:
            raise ObservationError(
                f"The statistics have actions of {self.get_action_dim(unnorm_key)} dimensions, the policy of "
                f"{self.action_dim}; choose the dataset that it was trained on with unnorm_key."
            )
        prompt = read_prompt(input_ids, attention_mask, self.config)
        proprio = _as_tensor(proprio)
        features = self.visual_tokens(pixel_values, len(input_ids))
        check_inputs(proprio=proprio, noise=noise if isinstance(noise, Tensor) else None)
        state = self._state_token(proprio, features)
        if isinstance(self.action_head, DiffusionActionHead):
            normalized = self._denoise(self.action_head, prompt, [features, *state], noise)
        elif noise is not None:
            raise ObservationError("noise was given, but only a diffusion head starts from noise.")
        else:
            hidden = self.action_hidden_states(prompt, [features, *state])
            normalized = self._read_out(hidden)
        normalized = checked(normalized, self.language_model, pixel_values=pixel_values, proprio=proprio, noise=noise)
        if self.action_head is None:
            normalized = actions.decode_bins(normalized, self.action_vocabulary, self.config.n_action_bins)
        found = actions.unnormalize(normalized, stats, epsilon=actions.OFT_EPSILON, bounds=self.bounds)
        return found[0] if len(found) == 1 else found

    def action_hidden_states(self, prompt: Prompt, inserted: list[Tensor], noisy: Tensor | None = None) -> Tensor:
        """Run one pass of the language model.

        Args:
            prompt: ends in the empty token.
            inserted: (B, n, D) each: the embeddings between BOS and the prompt.
            noisy: (B, chunk * dim, D) in the placeholders' places, zeros if None.

        Returns:
            (B, chunk * dim, D) final hidden states of the rows that act.
        """
        embeds, mask = self._sequence(prompt, inserted, noisy)
        output = self.language_model(
            inputs_embeds=embeds,
            attention_mask=self._bidirectional(mask, embeds.dtype),
            position_ids=real_positions(mask),
            use_cache=False,
            headless=True,
        )
        hidden = output.last_hidden_state
        rows = self.action_rows(prompt.mask).to(hidden.device)
        return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))

    def prepared(
        self, input_ids: Tensor, pixel_values: Tensor, proprio: Any = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor] | None:
        """Convert arguments of `predict_action` to those of `chunk_of`; return None if the prompts are of unequal
        length. Errors as of `predict_action`.
        """
        prompt = read_prompt(input_ids, attention_mask, self.config)
        if not prompt.even:
            return None
        features = self.visual_tokens(pixel_values, len(input_ids))
        weight = self.projector.fc1.weight
        inputs = {
            "input_ids": moved(prompt.ids, weight.device),
            "pixel_values": moved(pixel_values, weight.device, weight.dtype),
        }
        state = _as_tensor(proprio)
        check_inputs(proprio=state)
        self._state_token(state, features)  # raises if the state does not fit
        if state is not None:
            inputs["proprio"] = moved(state[None] if state.dim() == 1 else state, weight.device, weight.dtype)
        return inputs

    def length_of(self, input_ids: Tensor) -> int:
        """Return the number of positions of the sequence of `chunk_of`."""
        visual = self.visual_slice.stop - self.visual_slice.start
        return visual + (self.proprio_projector is not None) + input_ids.shape[1] + self.action_tokens + 1

    def chunk_of(self, input_ids: Tensor, pixel_values: Tensor, proprio: Tensor | None = None) -> Tensor:
        """Return the normalised actions (B, chunk, dim) float32 of a policy with an L1 head, computed from tensors
        alone.

        Args:
            input_ids: (B, T) prompts of one length that end in the empty token.
            pixel_values: (B, 6 * cameras, 224, 224).
            proprio: (B, dim) the robot's state, normalised, if the policy reads it.
        """
        features = self.projector(self.vision_backbone(pixel_values))
        embedding: Any = self.get_input_embeddings()
        text, stop = embedding(input_ids), embedding(torch.full_like(input_ids[:, :1], STOP))
        slots = text.new_zeros(len(text), self.action_tokens, text.shape[2])
        between = [tokens.to(text.dtype) for tokens in (features, *self._state_token(proprio, features))]
        embeds = torch.cat([text[:, :1], *between, text[:, 1:], slots, stop], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        output = self.language_model(
            inputs_embeds=embeds,
            attention_mask=self._bidirectional(mask, embeds.dtype),
            position_ids=real_positions(mask),
            use_cache=False,
            headless=True,
        )
        # Actions are read from the rows one to the left of the placeholders.
        end = embeds.shape[1] - 2
        return self._read_out(output.last_hidden_state[:, end - self.action_tokens : end])

    def _sequence(self, prompt: Prompt, inserted: list[Tensor], noisy: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (B, S, D) embeddings and (B, S) mask of the whole sequence."""
        full = prompt.followed_by([PLACEHOLDER] * self.action_tokens + [STOP], pad=self.config.pad_token_id)
        text = self.embed_text(full)
        slots = prompt.lengths[:, None] + torch.arange(self.action_tokens)
        slots = slots.to(text.device)[..., None].expand(-1, -1, text.shape[-1])
        filling = text.new_zeros(slots.shape) if noisy is None else noisy.to(text.device, text.dtype)
        return self.insert(text.scatter(1, slots, filling), full, inserted)

    def _bidirectional(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (B, 1, S, S): every row sees every real position; the results of padding rows are not read."""
        seen = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1).contiguous()
        if self.config.text_config._attn_implementation == "sdpa":
            return seen
        # Other backends add the mask to the scores.
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def _state_token(self, proprio: Tensor | None, features: Tensor) -> list[Tensor]:
        """Return a list of the (B, 1, D) token of the robot's state, empty if the policy does not read it."""
        projector = self.proprio_projector
        if projector is None:
            if proprio is not None:
                raise ObservationError("proprio was given, but this policy has no proprio projector; leave it out.")
            return []
        if proprio is None:
            raise ObservationError("This policy reads the robot's state; give proprio.")
        weight: Any = next(projector.parameters())
        value = moved(proprio, weight.device, weight.dtype)
        value = value[None] if value.dim() == 1 else value
        expected = (len(features), projector.proprio_dim)
        if tuple(value.shape) != expected:
            raise ObservationError(f"proprio must have the shape {expected}; found {tuple(value.shape)}.")
        return [projector(value)[:, None]]

    def _read_out(self, hidden: Tensor) -> Tensor:
        """Return (B, chunk, dim) of hidden states (B, chunk * dim, D): normalised actions, or tokens if there is no
        head.
        """
        if self.action_head is not None:
            return self.action_head(_for_head(hidden, self.action_head)).float()
        _, tokens = most_likely(self.language_model.lm_head(hidden))
        return tokens.reshape(len(hidden), self.chunk, self.action_dim)

    def _denoise(
        self, head: DiffusionActionHead, prompt: Prompt, inserted: list[Tensor], noise: Tensor | None
    ) -> Tensor:
        assert self.noisy_action_projector is not None
        device = inserted[0].device
        shape = (len(prompt.ids), self.chunk, self.action_dim)
        if noise is None:
            noise = torch.randn(shape, device=device, dtype=inserted[0].dtype)
        elif not isinstance(noise, Tensor) or tuple(noise.shape) != shape:
            found = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise ObservationError(f"noise must be a tensor of the shape {shape}; found {found}.")
        # The sampler adds and subtracts numbers of about the same size, so its state is never in half precision.
        sample = noise.to(device, torch.float32)
        try:
            for index, timestep in enumerate(self.ddim.timesteps.tolist()):
                self.denoising_step = index
                time = head.time_encoding(timestep).to(device).expand(len(sample), -1)[:, None]
                values = sample.reshape(len(sample), -1, 1)
                noisy = self.noisy_action_projector(_for_head(values, self.noisy_action_projector))
                hidden = self.action_hidden_states(prompt, [*inserted, time], noisy)
                predicted = head.predict_noise(_for_head(hidden, head)).to(device, torch.float32)
                sample = self.ddim.step(predicted, timestep, sample)
        finally:
            self.denoising_step = None
        return sample

    def _state(self, proprio: np.ndarray | None, unnorm_key: str | None) -> dict[str, Any]:
        if proprio is None or self.proprio_projector is None:
            return {"proprio": proprio}
        stats = self.statistics("proprio", unnorm_key)
        return {"proprio": actions.normalize_proprio(proprio, stats, bounds=self.bounds)}


def _as_tensor(proprio: Any) -> Tensor | None:
    if proprio is None or isinstance(proprio, Tensor):
        return proprio
    try:
        return torch.from_numpy(array_of(proprio).astype(np.float32))
    except (TypeError, ValueError) as error:
        raise ObservationError(f"proprio is an array of numbers; found {type(proprio).__name__} ({error}).") from error


def _for_head(tensor: Tensor, head: nn.Module) -> Tensor:
    weight = next(head.parameters())
    return moved(tensor, weight.device, weight.dtype)
