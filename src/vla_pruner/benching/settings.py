"""The settings of a benchmark, checked before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_pruner.attach.compiled import check_backend
from vla_pruner.attach.stages import check_depth
from vla_pruner.checkpoints.files import may_be_on_hub
from vla_pruner.checks import is_count, is_seed
from vla_pruner.errors import OptionError, UnsupportedModelError
from vla_pruner.flags import DTYPES
from vla_pruner.method_names import LAYER, Named, encoders_of, methods_of
from vla_pruner.methods import EncoderReuse, Method
from vla_pruner.plugins import class_at
from vla_pruner.registry import ROWS, Benchmark, Row, row_named

NAMED = tuple(row.name for row in ROWS if row.bench is not None and row.random is not None)
"""Policies with random weights, at their published size or tiny; aliases are understood, too."""
SHIPPED = "reference:"
"""The prefix of a `reference_policy`, to benchmark its weights."""
LLAMA = "llama:"
INDUCTOR = "inductor"
"""torch's own backend."""

SIZES = ("full", "tiny")

_LISTS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("keep", (int, float, Mapping), "a fraction such as 0.25 or a number such as 64"),
    ("methods", (str, Method), "a method's name such as 'vla-pruner', or a method such as VLAPruner(keep=0.25)"),
    ("pruned", (str,), "'drop', 'freeze' or 'reuse'"),
    ("layer", (int,), "a layer such as 3"),
    ("encoder_keep", (int, float), "a fraction such as 0.25 or a number such as 64"),
)


@dataclass(frozen=True)
class LlamaSize:
    """A plain Llama; its visual tokens are embeddings from position 1 on, 256 for each camera."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class BenchSettings:
    """One benchmark.

    Attributes:
        model: one of `NAMED` or an alias, "llama:HIDDEN,LAYERS[,HEADS,INTERMEDIATE,VOCAB]", "reference:NAME", or a
            checkpoint's folder or hub name; the class of a policy that is loaded already.
        size: "full" (published) or "tiny", of models with random weights.
        layers: depth of the decoder, and of an expert beside it; None: as published.
        keep: budgets, each a fraction or a number of visual tokens; one arm each. None: .25, and VLA-Cache's published
            one. It, `pruned`, `layer` and `refresh_every` are those of methods that are given by name.
        methods: names of methods, with options of their own after colons, or methods; one arm each.
        pruned: the fate of the other tokens, "drop", "freeze" or "reuse"; one arm each. None: as each method
            has it by default.
        layer: pruning layers; one arm each.
        encoder_keep: budgets of patches of each image that the vision encoder encodes, with every method; one arm each.
            None, and 1.0: all. It does not go with `compile`.
        batch: robots in one call.
        cameras: number of images; None: as published.
        dtype: of the weights.
        device: as torch names it.
        compile: whether every arm is compiled, the untouched model too; or the backend of `torch.compile` to do it
            with, instead of "inductor".
        prompt_tokens: positions of the prompt, visual tokens included; None: as published.
        decode_tokens: tokens that act, of models that decode them; None: as published.
        denoise_steps: of flow models; None: as published.
        refresh_every: of methods that have it: every n-th step runs unpruned; None: never, but at layer 0 every 8th.
        iters: timed control steps of each arm.
        threads: of torch on the CPU; None: as it is.
        seed: of weights and inputs.
        options: of a checkpoint, for `load_policy`.
        loaded: whether the policy is loaded already.

    Of `keep`, `methods`, `pruned`, `layer` and `encoder_keep` a single value stands for a tuple of one.
    """

    model: str
    size: str = "full"
    layers: int | None = None
    keep: tuple[float | int, ...] | None = None
    methods: tuple[str | Method, ...] = ("vla-pruner",)
    pruned: tuple[str, ...] | None = None
    layer: tuple[int, ...] = LAYER
    encoder_keep: tuple[float | int, ...] | None = None
    batch: int = 1
    cameras: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    compile: bool | str = False
    prompt_tokens: int | None = None
    decode_tokens: int | None = None
    denoise_steps: int | None = None
    refresh_every: int | None = None
    iters: int = 30
    threads: int | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    loaded: bool = False

    def __post_init__(self) -> None:
        for name, kinds, what in _LISTS:
            object.__setattr__(self, name, _listed(name, getattr(self, name), kinds, what))
        counts = ("layers", "batch", "cameras", "prompt_tokens", "decode_tokens", "denoise_steps", "iters", "threads")
        for name in counts:
            value = getattr(self, name)
            if value is not None and not is_count(value, 1):
                raise OptionError(f"{flag(name)} is {value!r}; it is a whole number of 1 or more.")
        if not is_seed(self.seed):
            raise OptionError(f"--seed is {self.seed!r}; it is a whole number of 0 or more, and below 2**32.")
        for name, known in (("size", SIZES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise OptionError(f"{flag(name)} is {getattr(self, name)}; it is {' or '.join(known)}.")
        for name in ("keep", "methods", "pruned", "layer", "encoder_keep"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise OptionError(f"{flag(name)} names nothing; give one value or several, separated by commas.")
        self._check_backend()
        self._check_model()
        encoders = self.chosen_encoders()
        if self.compile and any(encoders):
            raise OptionError(
                "--encoder-keep does not go with --compile: what the vision encoder holds from the last control step "
                "is no part of a static graph. Leave one of them out."
            )
        methods, depth = self.chosen_methods(), self._depth
        if depth is not None:
            for made in methods:
                check_depth(made.method, depth, 0 if self._bench is None else self._bench.first_layer)

    @property
    def row(self) -> Row | None:
        """The row of the model that is built; None for a checkpoint, and for a policy that is loaded already."""
        if self.loaded or self.model.startswith(SHIPPED):
            return None
        row = row_named("llama" if self.model.startswith(LLAMA) else self.model)
        return None if row is None or row.bench is None or self.model == "llama" else row

    @property
    def kind(self) -> str:
        """The name of `row`, or "checkpoint"."""
        return "checkpoint" if self.row is None else self.row.name

    @property
    def backend(self) -> str | None:
        """The backend that every arm is compiled with; None: they run as they are."""
        return self.compile if isinstance(self.compile, str) else INDUCTOR if self.compile else None

    def llama(self) -> LlamaSize:
        """Return the sizes that "llama:..." names; those left out are Llama's usual ones for this width.

        Raises:
            UnsupportedModelError: it cannot be read, or the width is no multiple of the heads.
        """
        words = self.model.removeprefix(LLAMA).split(",")
        if not 2 <= len(words) <= 5 or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            raise UnsupportedModelError(
                f"--model is {self.model}; it is llama:HIDDEN,LAYERS[,HEADS,INTERMEDIATE,VOCAB], such as llama:1024,16."
            )
        sizes = [int(word) for word in words]
        hidden, layers = sizes[:2]
        usual = [max(1, hidden // (128 if hidden >= 2048 else 64)), 256 * -(-hidden * 8 // (3 * 256)), 32064]
        heads, intermediate, vocabulary = sizes[2:] + usual[len(sizes) - 2 :]
        if hidden % heads or (hidden // heads) % 2:
            raise UnsupportedModelError(
                f"--model is {self.model}: a width of {hidden} does not divide into {heads} heads of an even width."
            )
        return LlamaSize(hidden, self.layers or layers, heads, intermediate, vocabulary)

    def chosen_methods(self) -> tuple[Named, ...]:
        """Return the method of every pruned arm.

        Raises:
            OptionError: a name is no method's, the options do not fit it, it prunes at several layers, or it needs
                reports that a benchmark does not make.
        """
        found: list[Named] = []
        for method in self.methods:
            if isinstance(method, str):
                found += methods_of((method,), self.keep, self.layer, self.pruned, self.refresh_every)
            else:
                found.append(Named.of(method))
        given = [name for name in ("keep", "pruned", "refresh_every") if getattr(self, name) is not None]
        given += ["layer"] if self.layer != LAYER else []
        if given and not any(isinstance(method, str) for method in self.methods):
            raise OptionError(
                f"{', '.join(map(flag, given))} is for methods that are given by name, and all of these are methods "
                "already; give them their own options, and leave it out."
            )
        for made in found:
            if len(made.method.stages()) > 1:
                raise OptionError(
                    f"{made.title} prunes at several layers, and the formulas of a benchmark know one layer a method; "
                    "leave `then` out."
                )
            if made.method.motion:
                raise OptionError(
                    f"{made.title} prunes by how far the arm moved, and in a benchmark no arm moves; leave its gate "
                    "out: a step that it prunes takes as long without."
                )
        return tuple(found)

    def chosen_encoders(self) -> tuple[EncoderReuse | None, ...]:
        """Return the choice of patches of every pruned arm; None: the encoder is left alone.

        Raises:
            OptionError: a budget is out of its range.
        """
        return encoders_of(self.encoder_keep)

    def to_json(self) -> dict[str, Any]:
        """Return the settings for `json.dump`, methods as Python shows them."""
        found = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "loaded"}
        return found | {
            "methods": [each if isinstance(each, str) else repr(each) for each in self.methods],
            "options": {name: value if _is_plain(value) else repr(value) for name, value in self.options.items()},
        }

    @property
    def _depth(self) -> int | None:
        """Layers of the decoder, if they are known before it is built."""
        if self.layers is not None:
            return self.layers
        if self.kind == "llama":
            return self.llama().layers
        return self._bench.layers if self._bench is not None and self.size == "full" else None

    @property
    def _bench(self) -> Benchmark | None:
        return None if self.row is None else self.row.bench

    def _check_backend(self) -> None:
        if not isinstance(self.compile, bool):
            check_backend(self.compile)
        if self.compile and self.row is not None and not class_at(self.row.family).compilable:
            raise UnsupportedModelError(
                f"--compile does not go with {self.model}: {self.row.title} runs its layers or its action head in a "
                "loop of its own, outside of any call that is compiled with what pruning does in it; leave --compile "
                "out."
            )

    def _check_model(self) -> None:
        kind = self.kind
        if kind == "llama":
            self.llama()
        elif (
            kind == "checkpoint"
            and not self.loaded
            and not self.model.startswith(SHIPPED)
            and not Path(self.model).exists()
            and not may_be_on_hub(self.model)
        ):
            raise UnsupportedModelError(
                f"--model is {self.model}, which is neither a folder nor one of {', '.join(NAMED)}, reference:NAME and "
                "llama:HIDDEN,LAYERS, nor a name on the Hugging Face hub (owner/name)."
            )
        options = ("prompt_tokens",) if self._bench is None else self._bench.options
        refused = {"option": self.options and (kind != "checkpoint" or self.loaded)}
        refused |= {"size": self.size != "full" and kind in ("checkpoint", "llama")}
        for name in ("layers", "cameras", "prompt_tokens", "decode_tokens", "denoise_steps"):
            refused[name] = getattr(self, name) is not None and name not in options
        for name, is_refused in refused.items():
            if is_refused:
                what = "a checkpoint" if kind == "checkpoint" and not self.loaded else self.model
                raise OptionError(f"{flag(name)} does not apply to {what}; leave it out.")


def _is_plain(value: Any) -> bool:
    """Return True if a file of JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def _listed(name: str, value: Any, kinds: tuple[type, ...], what: str) -> tuple[Any, ...] | None:
    """Return a setting that may have several values as a tuple of them.

    Raises:
        OptionError: it is of another kind.
    """
    if value is None and name in ("keep", "pruned", "encoder_keep"):
        return None
    several = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for each in several:
        if isinstance(each, bool) or not isinstance(each, kinds):
            given = f"the class {each.__name__}" if isinstance(each, type) else repr(each)
            raise OptionError(f"{flag(name)} is {given}; it is {what}, or several of them in a tuple.")
    return several


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + {"methods": "method"}.get(name, name).replace("_", "-")
