"""What a benchmark is asked to do, checked before anything is built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_pruner import methods
from vla_pruner.errors import BudgetError, UnsupportedModelError
from vla_pruner.methods import Method
from vla_pruner.methods.base import PRUNED

NAMED = ("openvla-7b", "openvla-oft", "pi0", "pi05", "smolvla", "reference")
DENOISING = ("pi0", "pi05", "smolvla")
LLAMA = "llama:"
FRESH = 8
"""At layer 0 a token that is gone is seen by nothing: this often all of them are looked at again."""

INDUCTOR = "inductor"
"""torch's own backend."""

SIZES = ("full", "tiny")
DTYPES = ("float32", "bfloat16", "float16")


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
        model: one of `NAMED`, "llama:HIDDEN,LAYERS[,HEADS,INTERMEDIATE,VOCAB]", or a checkpoint's folder.
        size: "full" (published) or "tiny", of models with random weights.
        layers: depth of the decoder, and of an expert beside it; None: as published.
        keep: budgets, each a fraction or a number of visual tokens; one arm each.
        methods: names of methods; one arm each.
        pruned: what becomes of the other tokens, "drop" or "freeze"; one arm each.
        layer: pruning layers; one arm each.
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
    """

    model: str
    size: str = "full"
    layers: int | None = None
    keep: tuple[float | int, ...] = (0.25,)
    methods: tuple[str, ...] = ("vla-pruner",)
    pruned: tuple[str, ...] = ("drop",)
    layer: tuple[int, ...] = (3,)
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

    def __post_init__(self) -> None:
        counts = ("layers", "batch", "cameras", "prompt_tokens", "decode_tokens", "denoise_steps", "iters", "threads")
        for name in counts:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise BudgetError(f"{flag(name)} is {value}; it is a whole number of 1 or more.")
        for name, known in (("size", SIZES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise BudgetError(f"{flag(name)} is {getattr(self, name)}; it is {' or '.join(known)}.")
        for name in ("keep", "methods", "pruned", "layer"):
            if not getattr(self, name):
                raise BudgetError(f"{flag(name)} names nothing; give one value or several, separated by commas.")
        unknown = [word for word in self.pruned if word not in PRUNED]
        if unknown:
            raise BudgetError(f"--pruned is {', '.join(unknown)}; it is drop, freeze, or drop,freeze.")
        self._check_backend()
        self._check_model()
        self.chosen_methods()

    @property
    def kind(self) -> str:
        """One of `NAMED`, "llama" or "checkpoint"."""
        if self.model.startswith(LLAMA):
            return "llama"
        return self.model if self.model in NAMED else "checkpoint"

    @property
    def backend(self) -> str | None:
        """What every arm is compiled with; None: they run as they are."""
        return self.compile if isinstance(self.compile, str) else INDUCTOR if self.compile else None

    def llama(self) -> LlamaSize:
        """The sizes that "llama:..." names; those left out are Llama's usual ones for this width.

        Raises:
            UnsupportedModelError: it cannot be read, or the width is no multiple of the heads.
        """
        words = self.model.removeprefix(LLAMA).split(",")
        if not 2 <= len(words) <= 5 or not all(word.strip().isdigit() and int(word) > 0 for word in words):
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

    def chosen_methods(self) -> tuple[tuple[str, Method], ...]:
        """Name and method of every pruned arm.

        Raises:
            BudgetError: a name is no method's, or the options do not fit it.
        """
        found = []
        for name in self.methods:
            kind = method_class(name)
            for layer in self.layer:
                for pruned in self.pruned:
                    for keep in self.keep:
                        options: dict[str, Any] = {"keep": keep, "layer": layer, "pruned": pruned}
                        refresh = self.refresh_every or (FRESH if layer == 0 else None)
                        if refresh is not None and hasattr(kind, "refresh_every"):
                            options["refresh_every"] = refresh
                        found.append((method_name(kind), kind(**options)))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """For `json.dump`."""
        return dataclasses.asdict(self)

    def _check_backend(self) -> None:
        if isinstance(self.compile, bool):
            return
        from torch._dynamo import list_backends

        known = list_backends(exclude_tags=())
        if self.compile not in known:
            raise BudgetError(f"compile={self.compile!r} was given; it is True, False, or one of {', '.join(known)}.")

    def _check_model(self) -> None:
        kind = self.kind
        if kind == "llama":
            self.llama()
        elif kind == "checkpoint" and not Path(self.model).exists():
            raise UnsupportedModelError(
                f"--model is {self.model}, which is neither a folder nor one of {', '.join(NAMED)} and "
                "llama:HIDDEN,LAYERS."
            )
        fixed = kind in ("checkpoint", "reference")
        refused = {
            "size": self.size != "full" and kind in ("checkpoint", "llama"),
            "layers": self.layers is not None and fixed,
            "cameras": self.cameras is not None and fixed,
            "prompt_tokens": self.prompt_tokens is not None and kind == "reference",
            "decode_tokens": self.decode_tokens is not None and kind not in ("llama", "openvla-7b"),
            "denoise_steps": self.denoise_steps is not None and kind not in DENOISING,
        }
        for name, is_refused in refused.items():
            if is_refused:
                what = "a checkpoint" if kind == "checkpoint" else self.model
                raise BudgetError(f"{flag(name)} does not apply to {what}; leave it out.")


def flag(name: str) -> str:
    """How the command line calls a setting."""
    return "--" + {"methods": "method"}.get(name, name).replace("_", "-")


def method_class(name: str) -> type[Method]:
    """The method of this name, written as its class or with dashes.

    Raises:
        BudgetError: there is none, or it has no `keep`.
    """
    plain = name.replace("-", "").replace("_", "").lower()
    for word, kind in known_methods().items():
        if plain in (word.replace("-", ""), kind.__name__.lower()):
            return kind
    raise BudgetError(f"--method is {name}; it is one of {', '.join(known_methods())}.")


def known_methods() -> dict[str, type[Method]]:
    """Every method that has a budget and drops tokens, by its name with dashes."""
    found: dict[str, type[Method]] = {}
    for name in methods.__all__:
        kind: Any = getattr(methods, name)
        is_method = isinstance(kind, type) and issubclass(kind, Method) and hasattr(kind, "keep")
        if is_method and "drop" in kind().treatments:
            found[method_name(kind)] = kind
    return found


def method_name(kind: type) -> str:
    """A method as the command line calls it: by the file that defines it."""
    return "random" if kind is methods.RandomKeep else kind.__module__.rpartition(".")[2].replace("_", "-")
