"""The questions that the attachment asks of a model family. Each family answers them in one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy, layers_of
from vla_pruner.attach.host import Host, Wiring
from vla_pruner.attach.layout import Layout
from vla_pruner.replacements import Replacements


@dataclass(frozen=True)
class Call:
    """The arguments of a call of the main decoder.

    Attributes:
        length: number of query positions Q.
        attention_mask: (B, N) of ones for real tokens, (B, 1, Q, W) as the layers see it, a dict of such, or None.
        rows: number of rows B.
        device: where it runs.
    """

    length: int
    attention_mask: Any
    rows: int
    device: torch.device

    def prompt(self) -> Tensor:
        """(B, N) bool: which prompt positions hold real tokens, as far as the mask tells."""
        mask = self.attention_mask
        if isinstance(mask, dict):
            mask = next(iter(mask.values()))
        if mask is None:
            return torch.ones(self.rows, self.length, dtype=torch.bool, device=self.device)
        if mask.dim() == 4:
            # What is real is what the query that sees most can see. The last query may be padding itself.
            visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
            widest = visible.sum(dim=-1).argmax(dim=-1)
            mask = visible[torch.arange(len(visible), device=visible.device), widest]
        return mask[:, : self.length].bool().expand(self.rows, -1)


class Family:
    """A model family. A subclass knows one architecture; it knows nothing of methods.

    Attributes:
        decoder: the decoder (`anatomy.layers_of`, `.config`) whose sequence is shortened.
        readers: other decoders, of as many layers, that read its key-value cache layer by layer (a flow-matching
            expert).
        eye: the module that is given the pixels of all cameras, once before each prompt; None where nobody knows which
            pixels a visual token covers, or where these tokens move in the prompt or run more than once in a step.
        cameras: the cameras' names; visual token ids run through them in this order. Empty where nobody named them.
        one_pass: whether actions are rows of the prompt's own pass, instead of decoded tokens or rows of an expert.
        freezes: whether tokens may stay readable while they are no longer computed: not where something reads the
            output of the last layer, of which they have none.
        called: whether calling the model itself (its `forward`) is part of a control step, as with language models.
            Else control steps are calls of its methods.
        kernel: what the decoder's attention modules compute where they do not ask transformers for an attention
            function, called as those are; None: they do.
        compilable: whether the calls of decoder and readers can run as graphs, with what pruning does in them.
        seeing: owner and name of a method that makes the prompt's embeddings of tensors alone, vision encoders and
            projector in it; compiled whole, in place of the encoders. None where there is no such method.
        acting: owner and name of a method that is given the prompt's embeddings (B, N, D), all of them real, and runs
            every call of the decoder in a control step; compiled whole, in place of the decoder's calls. Prompt and
            decoding are then one graph, as deep as all calls together, so it is for small models. None: call by call.
    """

    decoder: Any
    readers: tuple[Any, ...] = ()
    eye: nn.Module | None = None
    cameras: tuple[str, ...] = ("image",)
    one_pass: bool = False
    freezes: bool = True
    called: bool = False
    kernel: Callable[..., Any] | None = None
    compilable: bool = True
    seeing: tuple[Any, str] | None = None
    acting: tuple[Any, str] | None = None

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this family is the one for `model`."""
        raise NotImplementedError

    @property
    def anatomy(self) -> Anatomy:
        """The policy's parts, for tools; a family with vision encoders, projectors or a head names them here."""
        return Anatomy(self.decoder, self.readers)

    @property
    def depth(self) -> int:
        """Number of layers of the decoder."""
        return len(layers_of(self.decoder))

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        """Owners and names of methods whose call is a whole control step."""
        return ()

    def check_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what one of `whole_steps` was called with.

        Raises:
            SessionError: it asks for what a session cannot do.
        """

    @property
    def backend(self) -> str:
        """The attention implementation that the decoder really runs."""
        return self.decoder.config._attn_implementation

    @property
    def in_half(self) -> bool:
        """Whether the policy itself has its decoder computed in fewer digits than its weights have (autocast)."""
        return False

    @property
    def camera_tokens(self) -> tuple[int, ...] | None:
        """Visual tokens of each camera where the model alone decides it, else None."""
        return None

    @property
    def first_layer(self) -> int:
        """The lowest pruning layer: 0 where the call of the decoder itself can be made short, 1 where something else
        reads its first layer's cache.
        """
        return 1 if self.readers else 0

    def wiring(self, host: Host) -> Wiring | None:
        """A wiring of this model's own; None: hooks on the decoder and its layers."""
        return None

    def opens_step(self, call: Call) -> bool:
        """Whether a call of the decoder is a prefill, which opens a control step."""
        raise NotImplementedError

    def repeats_prompt(self, call: Call) -> bool:
        """Whether a call that opens no step runs the whole prompt again in the same control step (a denoising loop
        around the decoder): the kept tokens stay, and its action rows count as well.
        """
        return False

    def still_acting(self) -> Tensor | None:
        """(B,) bool: the rows of a batch whose attention counts in the call after the prompt that begins now; None:
        all do. Those that have emitted their last token, and are decoded on because others have not, do not.
        """
        return None

    def layout(self, call: Call) -> Layout:
        """Where things are in the sequence of this prefill. The very object that was returned before means that
        `action_rows` and what is kept have not changed either.
        """
        raise NotImplementedError

    def action_rows(self, layout: Layout) -> Tensor | None:
        """(B, R) prompt positions of the decoder's prefill whose attention is action attention; None if there are
        none.
        """
        return layout.last()

    def placeholder_rows(self, layout: Layout) -> Tensor | None:
        """(B, R) prompt positions in the places of actions, for methods that read these (`Method.reads_placeholders`);
        None if there are none. Where actions are emitted by other rows, these are not `action_rows`.
        """
        return self.action_rows(layout)

    def reader_rows(self, length: int, rows: int, device: torch.device) -> Tensor:
        """(B, R) query rows of a reader's call of `length` positions that act."""
        return torch.arange(length, device=device).expand(rows, -1)

    def patches(self, pixels: Tensor) -> Tensor:
        """The pixels (B, M, P) that each visual token covers, 0 being black, of what `eye` was given."""
        raise NotImplementedError

    def keys_values(
        self, layer: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """The rotated keys and the values (B, G, F, d) that a layer of the decoder would cache for hidden states (B,
        F, D).

        Args:
            layer: a layer of `decoder`.
            hidden: (B, F, D) hidden states as they enter the layer.
            position_embeddings: (cos, sin) as the layer is given them: (B or 1, F, d) each, or (3, B or 1, F, d).
        """
        raise NotImplementedError

    def angles(self, index: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) with which a layer of the decoder rotates.

        Args:
            index: of the layer.
            hidden: (B, F, D), of the device and dtype.
            positions: (B, F) int64, or (3 or 4, B, F) as the decoder was given them.
        """
        return self.decoder.rotary_emb(hidden, positions)

    def put_around(self, module: nn.Module, around: Callable[..., Any], replaced: Replacements) -> None:
        """Have what the decoder or a reader computes, after hooks on it ran, go through `around(original, ...)`."""
        replaced.put(module, "forward", around)

    def install(self) -> None:
        """Put in place whatever the family needs besides hooks on its decoders."""

    def remove(self) -> None:
        """Undo `install`."""
