"""LeRobot's GR00T N1.7 (`GrootPolicy`): the first layers of a Qwen3-VL, and a diffusion transformer that reads their
output.

The prompt runs once per action chunk. The output of its last layer goes through four layers of self-attention, and
every denoising step reads the result: a quarter of the transformer's blocks attend to the image tokens in it, another
quarter to its other tokens, the rest to their own rows. A dropped token has no output, so features and masks are
shortened together. Action attention is that of the action rows in the blocks that attend to images, averaged over the
denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.hooks import HookWiring
from vla_pruner.attach.host import Host, Wiring
from vla_pruner.attach.recorder import Attention
from vla_pruner.errors import UnsupportedModelError
from vla_pruner.families.lerobot_qwen import RegistersHooks
from vla_pruner.replacements import Replacements

MODULE = "lerobot.policies.groot.modeling_groot"


class Groot(RegistersHooks):
    """LeRobot's `GrootPolicy`; every chunk that it predicts is one control step."""

    named = (MODULE, "GrootPolicy")
    freezes = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.backbone = self._policy._groot_model.backbone
        self.head = self._policy._groot_model.action_head

    @staticmethod
    def vlm_of(model: Any) -> Any:
        return model._groot_model.backbone.model

    @staticmethod
    def anatomy_of(model: Any) -> Anatomy:
        """Return the parts of a `GrootPolicy`."""
        backbone = model._groot_model.backbone
        return Anatomy(
            decoder=backbone.language_model,
            experts=(model._groot_model.action_head.model,),
            towers=(backbone.visual,),
        )

    @property
    def anatomy(self) -> Anatomy:
        return self.anatomy_of(self._policy)

    @property
    def denoising(self) -> tuple[Any, ...]:
        return (self.head.vl_self_attention,)

    @property
    def in_half(self) -> bool:
        return self._policy.config.use_bf16

    def put_around(self, module: nn.Module, around: Callable[..., Any], replaced: Replacements) -> None:
        def decode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # GR00T asks for all hidden states, reads the last of them, and then prefers what its own hook saw.
            asked = kwargs.pop("output_hidden_states", False)
            output = around(original, *args, **kwargs)
            if asked:
                output["hidden_states"] = (output.last_hidden_state,)
            return output

        super().put_around(module, decode if module is self.decoder else around, replaced)

    def wiring(self, host: Host) -> Wiring:
        return GrootWiring(host, self)

    def reader_rows(self, length: int, rows: int, device: torch.device) -> Tensor:
        # [state][actions]
        return torch.arange(1, length, device=device).expand(rows, -1)

    def edit_expert_masks(self, layer: int, edit: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Make every mask (B, 1, 1, N) of the modules that attend to the decoder's features go through `edit`.

        For references that are computed without pruning.

        Returns:
            a function that removes the edit.
        """

        def attend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            features = kwargs.get("encoder_hidden_states")
            mask = kwargs.get("attention_mask")
            features = args[0] if features is None else features
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if mask is None else mask
            lowest = torch.finfo(features.dtype).min
            added = torch.zeros_like(mask, dtype=features.dtype).masked_fill(~mask, lowest)[:, None, None]
            return args, {**kwargs, "attention_mask": edit(added)[:, 0, 0] > lowest / 2}

        readers = [block.attn1 for block in getattr(self.head.vl_self_attention, "transformer_blocks", ())]
        readers += [block.attn1 for block in self.head.model.transformer_blocks[::2]]
        handles = [reader.register_forward_pre_hook(attend, with_kwargs=True) for reader in readers]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove


class GrootWiring(HookWiring):
    """Hooks on the decoder as in other families; the output of its last layer stays short, and so do its masks.

    Args:
        host: receives every call.
        family: the model's family.
    """

    def __init__(self, host: Host, family: Groot) -> None:
        super().__init__(host, family)
        self._groot = family
        self._replaced = Replacements()
        self._readers: list[Any] = []

    def install(self) -> None:
        """Put all hooks and replacements in place.

        Raises:
            UnsupportedModelError: the method freezes tokens, or `HookWiring` refuses the decoder.
        """
        if self._host.method.fate.readable and not self._family.freezes:
            raise UnsupportedModelError(
                f"{type(self._host.method).__name__} has pruned={self._host.method.pruned!r}, which GR00T cannot do: "
                "its action head reads the output of the decoder's last layer, and tokens that no longer pass through "
                'the layers have none. Drop them: VLAPruner(pruned="drop"), or --pruned drop on the command line.'
            )
        super().install()
        self._replaced.put(self._groot.backbone, "forward", self._see)
        reader = self._groot.head.model
        self._readers += [
            reader.register_forward_pre_hook(self._enter_reader, with_kwargs=True),
            reader.register_forward_hook(self._leave_reader),
            reader.register_forward_hook(self._end_turn, always_call=True),
        ]

    def remove(self) -> None:
        while self._readers:
            self._readers.pop().remove()
        self._replaced.remove()
        super().remove()

    def _tap_action(self) -> None:
        transformer = self._groot.head.model
        every = 2 * getattr(transformer, "attend_text_every_n_blocks", len(transformer.transformer_blocks))
        for index in self._host.method.action_layers(len(transformer.transformer_blocks)):
            if index % 2 == 0 and index % every:
                read = _Read(self._host, self._groot.depth - 1)
                attention: Any = transformer.transformer_blocks[index].attn1
                self._readers += [
                    attention.to_q.register_forward_hook(partial(read.note, "query")),
                    attention.to_k.register_forward_hook(partial(read.note, "key")),
                    attention.register_forward_hook(read.record, with_kwargs=True),
                ]

    def _see(self, original: Callable[..., Any], given: Any) -> Any:
        output = original(given)
        step = self._host.step
        short = None if step is None else step.shortening
        if short is not None:
            for name in ("backbone_attention_mask", "image_mask"):
                output[name] = short.live_rows(output[name])
        return output


class _Read:
    """Reports the attention of one block to a host; keeps its queries and keys as they are computed.

    Args:
        host: receives the attention.
        layer: index of the decoder's layer whose output the block reads.
    """

    def __init__(self, host: Host, layer: int) -> None:
        self._host = host
        self._layer = layer
        self._made: dict[str, Tensor] = {}

    def note(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        """Keep the query or the key (B, N, H d) that was computed."""
        self._made[name] = output

    def record(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Report the block's attention to the host after its call."""
        query, key = (
            self._made.pop(name).unflatten(-1, (module.heads, -1)).transpose(1, 2) for name in ("query", "key")
        )
        mask = kwargs["attention_mask"]
        attention = Attention(
            query=query,
            key=key,
            mask=None if mask is None else mask[:, None, None],
            causal=False,
            scaling=module.scale,
            softcap=None,
        )
        self._host.record_reader(self._layer, attention)
