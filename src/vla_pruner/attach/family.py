"""The interface of a model family to the attachment. Each family implements it in one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy, layers_of
from vla_pruner.attach.encoder import Encoder
from vla_pruner.attach.host import Host, Wiring
from vla_pruner.attach.layout import Layout
from vla_pruner.errors import UnsupportedModelError
from vla_pruner.replacements import Replacements


@dataclass(frozen=True)
class Call:
    """The arguments of a call of the main decoder.

    Attributes:
        length: number of query positions Q.
        attention_mask: (B, N) of ones for real tokens, (B, 1, Q, W) as the layers see it, a dict of such, or None.
        rows: number of rows B.
        device: of the call.
    """

    length: int
    attention_mask: Any
    rows: int
    device: torch.device

    def prompt(self) -> Tensor:
        """Return (B, N) bool: the prompt positions that hold real tokens, as far as the mask shows."""
        mask = self.attention_mask
        if isinstance(mask, dict):
            mask = next(iter(mask.values()))
        if mask is None:
            return torch.ones(self.rows, self.length, dtype=torch.bool, device=self.device)
        if mask.dim() == 4:
            # A position is real if the query that sees most can see it. The last query may be padding itself.
            visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
            widest = visible.sum(dim=-1).argmax(dim=-1)
            mask = visible[torch.arange(len(visible), device=visible.device), widest]
        return mask[:, : self.length].bool().expand(self.rows, -1)


@dataclass(frozen=True)
class StepFunction:
    """A control step as a function of tensors, for `Session.export`.

    Attributes:
        run: the function, called with `inputs` by name. It runs one prompt, and all of its calls of the decoder belong
            to this control step.
        inputs: an example of each argument.
        output: the name of its result.
        call: the prompt's call of the decoder.
    """

    run: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    output: str
    call: Call


class Family:
    """A model family. A subclass knows one architecture; it knows nothing of methods.

    Attributes:
        decoder: the decoder (`anatomy.layers_of`, `.config`) whose sequence is shortened.
        readers: other decoders, of as many layers, that read its key-value cache layer by layer (a flow-matching
            expert).
        eye: the module that is given the pixels of all cameras, once before each prompt; None if it is not known which
            pixels a visual token covers, or if these tokens move in the prompt or run more than once in a step.
        encoder: the parts of the vision encoder for `EncoderReuse`; None: its patches cannot be reused.
        cameras: the cameras' names; visual token ids run through them in this order. Empty if they were not named.
        one_pass: whether actions are rows of the prompt's own pass, instead of decoded tokens or rows of an expert.
        freezes: whether tokens may stay readable while they are no longer computed; False if something reads the output
            of the last layer, since frozen tokens have none.
        called: whether calling the model itself (its `forward`) is part of a control step, as with language models.
            Else control steps are calls of its methods.
        kernel: the function that the decoder's attention modules run, with the signature of transformers' attention
            functions, if they do not ask transformers for one; None: they ask.
        denoises: whether all calls of the decoder after the prompt's denoise actions: each runs the same rows over the
            prompt's cache, and leaves nothing in it.
        compilable: whether the calls of decoder and readers can run as graphs, with the work of pruning in them.
        seeing: owner and name of a method that makes the prompt's embeddings of tensors alone, vision encoders and
            projector in it; compiled whole, in place of the encoders. None if there is no such method.
        acting: owner and name of a method that is given the prompt's embeddings (B, N, D), all of them real, and runs
            every call of the decoder in a control step; compiled whole, in place of the decoder's calls. Prompt and
            decoding are then one graph, as deep as all calls together, so it is for small models. None: call by call.
    """

    decoder: Any
    readers: tuple[Any, ...] = ()
    eye: nn.Module | None = None
    encoder: Encoder | None = None
    cameras: tuple[str, ...] = ("image",)
    one_pass: bool = False
    freezes: bool = True
    called: bool = False
    kernel: Callable[..., Any] | None = None
    denoises: bool = False
    compilable: bool = True
    seeing: tuple[Any, str] | None = None
    acting: tuple[Any, str] | None = None

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Return True if this family is the one for `model`."""
        raise NotImplementedError

    @property
    def anatomy(self) -> Anatomy:
        """The policy's parts, for tools; a family with vision encoders, projectors or a head names them here."""
        return Anatomy(self.decoder, self.readers)

    @property
    def encoding(self) -> tuple[tuple[Any, str], ...]:
        """Owners and names of the methods, of vision encoders or their parts, whose calls can run as graphs."""
        return tuple((tower, "forward") for tower in self.anatomy.towers)

    @property
    def denoising(self) -> tuple[Any, ...]:
        """Modules of an action head, beside `anatomy.experts`, whose calls can run as graphs; a session does nothing in
        them.
        """
        return ()

    @property
    def depth(self) -> int:
        """Number of layers of the decoder."""
        return len(layers_of(self.decoder))

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        """Owners and names of methods whose call is a whole control step."""
        return ()

    def check_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the arguments of one of `whole_steps`.

        Raises:
            SessionError: it asks for something that a session cannot do.
        """

    @property
    def backend(self) -> str:
        """The attention implementation that the decoder really runs."""
        return self.decoder.config._attn_implementation

    @property
    def in_half(self) -> bool:
        """True if the policy itself runs its decoder in a lower precision than that of its weights (autocast)."""
        return False

    @property
    def camera_tokens(self) -> tuple[int, ...] | None:
        """The number of visual tokens of each camera if the model alone decides it, else None."""
        return None

    @property
    def first_layer(self) -> int:
        """The lowest pruning layer: 0 if the call of the decoder itself can be made short, 1 if something else reads
        its first layer's cache.
        """
        return 1 if self.readers else 0

    def wiring(self, host: Host) -> Wiring | None:
        """Return a wiring of this model's own; None: hooks on the decoder and its layers."""
        return None

    def shows_nothing(self, call: Call) -> bool:
        """Return True if the model was called without an image. A sequence that begins with such a call is no control
        step and runs untouched.
        """
        return False

    def opens_step(self, call: Call) -> bool:
        """Return True if a call of the decoder is a prefill, which opens a control step."""
        raise NotImplementedError

    def check_short_token(self) -> None:
        """Check a call that decodes a token with a cache that is short in every layer.

        Raises:
            SessionError: the model took the token's position from the cache's length.
        """

    def repeats_prompt(self, call: Call) -> bool:
        """Return True if a call that opens no step runs the whole prompt again in the same control step (a denoising
        loop around the decoder): the kept tokens stay, and its action rows count as well.
        """
        return False

    def still_acting(self) -> Tensor | None:
        """Return the rows of a batch whose attention counts in the call that now begins after the prompt, (B,) bool;
        None: all rows. Rows that have emitted their last token do not count, even if they are decoded on because other
        rows have not finished.
        """
        return None

    def layout(self, call: Call) -> Layout:
        """Return the layout of this prefill. If it is the very object that was returned before, `action_rows` and the
        kept tokens have not changed either.
        """
        raise NotImplementedError

    def action_rows(self, layout: Layout) -> Tensor | None:
        """(B, R) prompt positions of the decoder's prefill whose attention is action attention; None if there are
        none.
        """
        return layout.last()

    def placeholder_rows(self, layout: Layout) -> Tensor | None:
        """(B, R) prompt positions in the places of actions, for methods that read these (`Method.reads_placeholders`);
        None if there are none. If other rows emit the actions, these are not `action_rows`.
        """
        return self.action_rows(layout)

    def reader_rows(self, length: int, rows: int, device: torch.device) -> Tensor:
        """Return (B, R) query rows of a reader's call of `length` positions that act."""
        return torch.arange(length, device=device).expand(rows, -1)

    def patches(self, pixels: Tensor) -> Tensor:
        """Return the pixels (B, M, P) that each visual token covers, 0 being black, from the input of `eye`."""
        raise NotImplementedError

    def exported(self, example: Mapping[str, Any]) -> StepFunction:
        """Return a control step of the example's shapes as a function of tensors.

        Args:
            example: arguments of the policy's own call, by name; without padding.

        Raises:
            UnsupportedModelError: this family cannot be exported.
            OptionError: an argument is missing or unknown.
        """
        instead = " Use session.compile() here." if self.compilable else ""
        raise UnsupportedModelError(
            f"A control step of {type(self).__name__} cannot be exported; those of language models, of OpenVLA-OFT "
            f"with an L1 head and of the reference policies can.{instead}"
        )

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
        """Return (cos, sin) with which a layer of the decoder rotates.

        Args:
            index: of the layer.
            hidden: (B, F, D), of the device and dtype.
            positions: (B, F) int64, or (3 or 4, B, F) as the decoder was given them.
        """
        return self.decoder.rotary_emb(hidden, positions)

    def put_around(self, module: nn.Module, around: Callable[..., Any], replaced: Replacements) -> None:
        """Make the computation of the decoder or a reader, after its hooks, go through `around(original, ...)`, with
        the embeddings as the first argument or by name.
        """
        replaced.put(module, "forward", around)

    def encode_together(self, replaced: Replacements) -> None:
        """Replace what makes the policy encode each camera in a call of its own, so that one call encodes all of them.

        Compiled policies are put together in this way, with a session and without one. The features agree to rounding.
        """

    def install(self) -> None:
        """Put in place whatever the family needs besides hooks on its decoders."""

    def remove(self) -> None:
        """Undo `install`."""
