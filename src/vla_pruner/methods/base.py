"""The base of all methods: a frozen set of options and one pure function that chooses the visual tokens that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from torch import Tensor

from vla_pruner.checks import check_choice, is_count
from vla_pruner.errors import BudgetError
from vla_pruner.fate import WITHIN_A_STEP, Fate
from vla_pruner.methods.memory import Memory
from vla_pruner.methods.numbers import plain
from vla_pruner.methods.schedule import Schedule
from vla_pruner.plugins import object_at
from vla_pruner.registry import ATTACH

if TYPE_CHECKING:
    from vla_pruner import Session
    from vla_pruner.methods.encoder_reuse import EncoderReuse

Keep = float | int | Mapping[str, float | int]
_Progressive = TypeVar("_Progressive", bound="Method")


@dataclass(frozen=True)
class Evidence:
    """The evidence that a session gathered for one control step; optional fields that the method's `needs` does not
    name are None.

    Attributes:
        valid: (B, M) bool, False for visual tokens that are masked out (an absent camera).
        memory: the rows' memory of the steps before.
        semantic: (B, M) float32, prefill attention that each visual token received; there if "semantic" is needed.
        features: (B, M, D) hidden states of the visual tokens, as they enter the pruning layer ("features") or the
            first layer ("embeddings").
        similarity: (B, M) float32, cosine similarity of the pixels that each visual token covers to those of the last
            control step; there if "similarity" is needed.
        relevance: (B, M) float32, the result of `Method.text_relevance`; there if "relevance" is needed.
        steps: (B,) int64, `memory.steps` on the device of the scores; the memory itself counts on the CPU. None copies
            them, which is not possible inside a CUDA graph.
    """

    valid: Tensor
    memory: Memory
    semantic: Tensor | None = None
    features: Tensor | None = None
    similarity: Tensor | None = None
    steps: Tensor | None = None
    relevance: Tensor | None = None

    def __post_init__(self) -> None:
        if self.steps is None:
            object.__setattr__(self, "steps", self.memory.steps.to(self.valid.device, non_blocking=True))

    def span(self, start: int, stop: int) -> Evidence:
        """Return the evidence on the visual tokens of ids `start` to `stop` alone."""
        return self._on(lambda found: found[:, start:stop], lambda held: held[:, :, start:stop])

    def of(self, ids: Tensor) -> Evidence:
        """Return the evidence on the visual tokens `ids` (B, m) alone."""

        def take(found: Tensor) -> Tensor:
            return rows_at(found, ids) if found.dim() == 3 else found.gather(1, ids)

        return self._on(take, lambda held: held.gather(2, ids[:, None].expand(-1, held.shape[1], -1)))

    def _on(self, take: Callable[[Tensor], Tensor], take_held: Callable[[Tensor], Tensor]) -> Evidence:
        """Return the evidence on some of the visual tokens.

        Args:
            take: returns them of what is (B, M) or (B, M, D).
            take_held: returns them of what the memory holds, (B, W, M).
        """
        held = {name: take_held(getattr(self.memory, name)) for name in ("action", "age", "semantic")}
        found = {name: getattr(self, name) for name in ("valid", "semantic", "features", "similarity", "relevance")}
        taken = {name: take(value) for name, value in found.items() if value is not None}
        return replace(self, memory=replace(self.memory, **held), **taken)


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass is a frozen dataclass that defines `budget` and `select`; it holds options,
    never state.

    Attributes:
        layer: decoder layers before this one (0-based) run on every token.
        pruned: the fate, from `layer` on, of the visual tokens that are not kept. "drop" takes them away, as published.
            "freeze" stops updating them but leaves them readable: their keys and values at every later layer are those
            of the hidden state with which they entered `layer`. "reuse", for methods made for it, leaves them readable
            too, with the keys and values that they had in the last control step.
    """

    layer: int = field(default=3, kw_only=True)
    pruned: str = field(default="drop", kw_only=True)

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, plain(getattr(self, option.name)))
        if not is_count(self.layer, 0):
            raise BudgetError(
                f"layer={self.layer!r} was given; the pruning layer is an int of 0 or more (the paper's is 3)."
            )
        if self.layer == 0 and "semantic" in self.needs and not self.remembers_semantic:
            raise BudgetError(
                f"layer=0 was given, but {type(self).__name__} chooses by attention in the layer before; give layer=1 "
                "or more."
            )
        check_choice("pruned", self.pruned, self.treatments)
        object.__setattr__(self, "pruned", str(self.pruned))

    @property
    def needs(self) -> frozenset[str]:
        """The evidence that `select` reads: any of "semantic", "action", "similarity" and "relevance", and one of
        "features" and "embeddings".
        """
        return frozenset()

    @property
    def treatments(self) -> tuple[str, ...]:
        """The values that `pruned` may have."""
        return WITHIN_A_STEP

    @property
    def told(self) -> tuple[str, ...]:
        """Options that titles tell although they may be defaults, each as "name=value"."""
        return ()

    @property
    def of_preset(self) -> Mapping[str, Any]:
        """The values that the method's preset, if it has presets, brings in place of the defaults, by option."""
        return {}

    @property
    def fate(self) -> Fate:
        """The fate of the visual tokens that are not kept: `pruned` as an object with properties.

        Raises:
            OptionError: `treatments` has a word that is no fate.
        """
        return Fate.of(self.pruned)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the control steps that are pruned; by default all of them are."""
        return Schedule()

    @property
    def history(self) -> int:
        """The number of control steps whose action scores the memory must hold."""
        return 0

    @property
    def motion(self) -> int:
        """The number of last control steps whose motion the method reads. `Session.moved` must be called with it after
        each step. 0: no motion is read.
        """
        return self.schedule.gate or 0

    @property
    def remembers_semantic(self) -> bool:
        """True if the memory must hold the semantic scores too, for a choice before the first layer."""
        return False

    @property
    def semantic_layer(self) -> int:
        """The layer at which the semantic score is read: the one before pruning, as in the paper."""
        return max(self.layer, 3) - 1 if self.layer == 0 else self.layer - 1

    @property
    def queries(self) -> str:
        """The rows over which the semantic score averages: "all" prompt tokens, the "text" after the image, the "last"
        token, or the "raters" that the method chooses itself.
        """
        return "all"

    @property
    def attention(self) -> str:
        """The quantity that the semantic score averages: attention "probabilities", or the "logits" under them."""
        return "probabilities"

    def raters(self, visual: Tensor, valid: Tensor, prompt: Tensor, text: Tensor) -> Tensor:
        """Return the weights (B, N) of the prompt rows over which the semantic score averages, if `queries` is
        "raters".

        Args:
            visual: (B, M, D) visual tokens as they enter the first layer.
            valid: (B, M) bool, False for visual tokens that are masked out.
            prompt: (B, N, D) the whole prompt as it enters the first layer.
            text: (B, N) bool, the real, non-visual tokens after the image; at least one in each row.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say which rows rate: define raters(visual, valid, prompt, text)."
        )

    def text_relevance(self, visual: Tensor, prompt: Tensor, text: Tensor) -> Tensor:
        """Return (B, M) float32: how well each visual token fits the text. Called if "relevance" is needed.

        Args:
            visual: (B, M, D) visual tokens as they enter the first layer.
            prompt: (B, N, D) the whole prompt as it enters the first layer.
            text: (B, N) bool, the real, non-visual tokens after the image; at least one in each row.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say what is relevant: define text_relevance(visual, prompt, text)."
        )

    @property
    def reads_placeholders(self) -> bool:
        """True if the rows in the actions' places count as action rows in a policy that acts in the rows of its
        prompt's pass, instead of the rows that emit the actions (one to the left in OpenVLA-OFT).
        """
        return False

    def fitted(self, one_pass: bool) -> Method:
        """Return this method as it is carried out on a model; most are the same on all.

        Args:
            one_pass: whether the model's actions are rows of its prompt's own pass, instead of decoded tokens or rows
                of an expert.
        """
        return self

    def stages(self) -> tuple[Method, ...]:
        """Return the method of each pruning layer, in the order of their `layer`. All but progressive methods have one
        stage, the method itself. A later stage chooses among the tokens that the one before left, and its `keep` is of
        all visual tokens. `prunes`, `history` and `pruned` are read from the method itself.
        """
        return (self,)

    def action_layers(self, layers: int) -> tuple[int, ...]:
        """Return the decoder layers (0-based, of `layers`) at which action attention is read: the later half, as in the
        paper.

        Raises:
            BudgetError: the model is too shallow for this method.
        """
        return tuple(range(layers // 2, layers))

    def prunes(self, memory: Memory) -> bool:
        """Return True if the control step after `memory` is pruned: by the `schedule`, which the random control of an
        evaluation keeps to as well. Only counters on the CPU may be read.
        """
        return self.schedule.prunes(memory)

    def reuses(self, similarity: Tensor, count: int) -> bool:
        """Return True if a control step that `prunes` may reuse `count` tokens of the last one. Called if `pruned` is
        "reuse".

        Args:
            similarity: (B, M) float32, as in `Evidence`.
            count: how many visual tokens of each row are reused in the end.
        """
        return True

    def budget(self, tokens: int) -> int:
        """Return the number of visual tokens kept out of `tokens`.

        Raises:
            BudgetError: more are to be kept than there are.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say how many tokens it keeps: define budget(tokens)."
        )

    def budget_of_present(self, tokens: int, present: int) -> int:
        """Return the number kept out of `tokens` visual tokens if only `present` of them belong to cameras that are
        there.

        A fraction is taken of those present; a number of tokens stays, but is at most `present`.

        Raises:
            BudgetError: as `budget`.
        """
        if isinstance(getattr(self, "keep", None), float):
            return self.budget(present)
        return min(self.budget(tokens), present)

    def for_cameras(self, names: tuple[str, ...]) -> tuple[Self, ...] | None:
        """Return this method with each camera's own `keep`, in the order of `names`; None if `keep` is one budget for
        all.

        Raises:
            BudgetError: `keep` names other cameras than the policy has.
        """
        keep = getattr(self, "keep", None)
        if not isinstance(keep, Mapping):
            return None
        if not names:
            raise BudgetError(
                "keep was given per camera, but this model does not name its cameras: attach(model, cameras=(...))."
            )
        if set(keep) != set(names):
            raise BudgetError(
                f"keep was given for {', '.join(map(repr, keep))}, but the policy's cameras are "
                f"{', '.join(map(repr, names))}; name each of them once."
            )
        fields: Any = [{"keep": keep[name]} for name in names]
        return tuple(replace(self, **field) for field in fields)

    def select(self, evidence: Evidence, k: int) -> Tensor:
        """Return the ids (B, k) int64, sorted, of the visual tokens that each row keeps."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say which tokens it keeps: define select(evidence, k)."
        )

    def attach(
        self,
        model: Any,
        compile: bool = False,
        only_if_faster: bool = False,
        encoder: EncoderReuse | None = None,
        **family_options: Any,
    ) -> Session:
        """Attach to `model` in place and return the session, which is also a context manager.

        Args:
            model: a supported policy or language model (a module), or a policy that `load_policy` made.
            compile: call `session.compile()` at once.
            only_if_faster: call `session.detach_unless_faster()` at once: control steps are timed, and the session
                detaches itself if pruned ones are not faster.
            encoder: the patches that the vision encoder encodes, the others being reused from the last control step;
                None: all. It does not go with `compile` and `only_if_faster`.
            **family_options: options of the model's family, for instance `visual=slice(1, 257)` for a language model;
                and `family=MyFamily` for a family of the caller's own that no installed distribution names.

        Raises:
            UnsupportedModelError: the model, its version or its attention backend is not supported.
            BudgetError: `keep` or `layer` does not fit this model.
            OptionError: an option is not one of the model's family, or `encoder` does not go with the method.
            SessionError: a session is attached to this model already.
        """
        # Users hold a method, so attaching starts here although `attach` is a layer above.
        return object_at(ATTACH)(self, model, compile, only_if_faster, encoder, **family_options)


def rows_at(rows: Tensor, ids: Tensor) -> Tensor:
    """Return the rows `ids` (B, m) of `rows` (B, M, D): (B, m, D)."""
    return rows.gather(1, ids[..., None].expand(-1, -1, rows.shape[2]))


def check_keep(keep: object) -> None:
    """Raise BudgetError unless `keep` is a float in (0, 1], an int of 1 or more, or maps camera names to such."""
    if isinstance(keep, Mapping) and keep:
        for camera, amount in keep.items():
            if not isinstance(camera, str) or isinstance(amount, Mapping):
                raise BudgetError(f"keep={keep!r} was given; per camera it maps a name to a fraction or a number.")
            check_keep(amount)
        return
    is_fraction = isinstance(keep, float) and 0 < keep <= 1
    if not is_count(keep, 1) and not is_fraction:
        raise BudgetError(
            f"keep={keep!r} was given; keep is a fraction in (0, 1] as a float, or a number of visual tokens as an int "
            "(so keep=1 is one token and keep=1.0 is all of them), or maps each camera's name to one of these."
        )


def check_stages(then: object) -> None:
    """Raise BudgetError unless `then` is a tuple of later pruning layers, each with a `keep`."""
    if not isinstance(then, tuple) or not all(isinstance(stage, tuple) and len(stage) == 2 for stage in then):
        raise BudgetError(
            f"then={then!r} was given; it is a tuple of further pruning layers, each with what it keeps: "
            "then=((6, 0.35), (15, 0.19))."
        )
    for layer, keep in then:
        if not is_count(layer, 1):
            raise BudgetError(f"then={then!r} was given; its layers are ints of 1 or more.")
        try:
            check_keep(keep)
        except BudgetError as error:
            raise BudgetError(f"then={then!r} was given; at its layer {layer}, {error}") from error


def progressive(method: _Progressive, then: tuple[tuple[int, Keep], ...]) -> tuple[_Progressive, ...]:
    """Return the stages of a method with the option `then`: the method without it, and again for each layer in it with
    what is kept from there on.
    """
    first = replace(method, then=())
    return (first, *(replace(first, layer=layer, keep=keep) for layer, keep in then))


def resolve_keep(keep: Keep, tokens: int) -> int:
    """Return the number of tokens that `keep` means among `tokens` visual tokens: at least one, halves rounded to even.

    Raises:
        BudgetError: a number of tokens larger than there are, or a `keep` per camera: see `Method.for_cameras`.
    """
    if isinstance(keep, Mapping):
        raise BudgetError(f"keep={keep!r} is per camera: budget() is asked of each camera's own method.")
    if isinstance(keep, float):
        return max(1, round(keep * tokens))
    if keep > tokens:
        raise BudgetError(
            f"keep={keep} tokens was given, but the model has {tokens} visual tokens; give at most that many."
        )
    return keep
