"""One row for each kind of policy: all that the package knows of it outside of its own files.

A row names classes and functions as "module:name". They are imported when they are used, so the table costs nothing and
may name modules above it. A family of another distribution gives its own row as the attribute `row` of its class.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

from vla_pruner.errors import PluginError
from vla_pruner.plugins import FAMILIES, Plugin, plugins

ATTACH = "vla_pruner.front:attach"
"""The target of `Method.attach`: a function of (method, model, compile, family options...) that returns the session."""

PRESENT = ...
"""In `Row.config`: the key is there, whatever its value."""


@dataclass(frozen=True)
class Benchmark:
    """The settings with which `vla-pruner bench` runs a policy.

    Attributes:
        feed: a function of (policy, `BenchSettings`, device) that returns a `vla_pruner.feed.Feed`.
        build: a function of (`BenchSettings`, device, dtype) that returns the policy; None: `Row.random` does.
        layers: layers of the decoder at its published size; None: not known before it is built.
        options: the settings that apply, of "layers", "cameras", "prompt_tokens", "decode_tokens", "denoise_steps".
        first_layer: the lowest pruning layer, as of `Family.first_layer`.
    """

    feed: str
    build: str | None = None
    layers: int | None = None
    options: tuple[str, ...] = ()
    first_layer: int = 0


@dataclass(frozen=True)
class Row:
    """A kind of policy.

    Attributes:
        name: as on the command line, with --random-weights and in benchmarks.
        title: as messages name it.
        family: the adapter's class, which extends `vla_pruner.attach.family.Family`.
        policy: class of the results of `load` and `random`.
        module: class of the module that it drives; None: it is the module itself.
        aliases: other names.
        config: the marks of its config.json: keys with their values, `PRESENT` or None (absent). None: no folder holds
            it. Of several rows that fit, the first one loads the folder.
        load: a function of (folder, device, dtype, options...) that returns the policy.
        random: a function of (size, device, dtype, seed) that returns one with random weights, size "tiny" or "full".
        bench: how it is benchmarked; None: it is not.
        conventions: by simulator, a function that returns a `vla_pruner.simulators.base.Convention`, or None if the
            policy was not trained for it. Of "libero" it is given (policy, center_crop); of "metaworld", (policy,
            suite); of "simpler", (policy, dataset), the name of the statistics that scale its actions.
    """

    name: str
    title: str
    family: str
    policy: str
    module: str | None = None
    aliases: tuple[str, ...] = ()
    config: Mapping[str, str | EllipsisType | None] | None = None
    load: str | None = None
    random: str | None = None
    bench: Benchmark | None = None
    conventions: Mapping[str, str] = field(default_factory=dict)

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Return True if a config.json is of this kind of policy."""
        return self.config is not None and all(
            key in config if wanted is PRESENT else config.get(key) == wanted for key, wanted in self.config.items()
        )


_EXPERT_OPTIONS = ("layers", "cameras", "prompt_tokens", "denoise_steps")
_DECODING_OPTIONS = ("layers", "cameras", "prompt_tokens", "decode_tokens")

ROWS = (
    Row(
        name="reference",
        title="the reference policy",
        family="vla_pruner.families.reference:Reference",
        policy="vla_pruner.models.reference.network:ReferencePolicy",
        config={"proprio_mean": PRESENT, "vision_width": PRESENT, "executed": None, "model_type": None, "type": None},
        load="vla_pruner.policies.reference:load_reference",
        random="vla_pruner.policies.random:random_reference",
        bench=Benchmark(
            feed="vla_pruner.benching.feeds:reference", build="vla_pruner.benching.policies:reference", layers=8
        ),
    ),
    Row(
        name="reference-chunk",
        title="the two-camera reference policy",
        family="vla_pruner.families.chunk:Chunk",
        policy="vla_pruner.models.chunk.network:ChunkPolicy",
        config={
            "proprio_mean": PRESENT,
            "vision_width": PRESENT,
            "executed": PRESENT,
            "model_type": None,
            "type": None,
        },
        load="vla_pruner.policies.reference:load_reference",
        random="vla_pruner.policies.random:random_chunk",
        bench=Benchmark(feed="vla_pruner.benching.feeds:chunk", layers=10),
        conventions={
            "libero": "vla_pruner.simulators.libero_conventions:two_cameras",
            "metaworld": "vla_pruner.simulators.metaworld_suite:two_cameras",
        },
    ),
    Row(
        name="openvla",
        aliases=("openvla-7b",),
        title="OpenVLA",
        family="vla_pruner.families.openvla:OpenVLA",
        policy="vla_pruner.models.openvla.network:OpenVLAForActionPrediction",
        config={"model_type": "openvla"},
        load="vla_pruner.models.openvla:load_openvla",
        random="vla_pruner.policies.random:random_openvla_7b",
        bench=Benchmark(
            feed="vla_pruner.benching.feeds:openvla",
            build="vla_pruner.benching.policies:openvla",
            layers=32,
            options=_DECODING_OPTIONS,
        ),
        conventions={
            "libero": "vla_pruner.simulators.libero_conventions:openvla",
            "simpler": "vla_pruner.simulators.simpler_conventions:openvla",
        },
    ),
    Row(
        name="openvla-oft",
        title="OpenVLA-OFT",
        family="vla_pruner.families.openvla:OpenVLAOFT",
        policy="vla_pruner.models.openvla.oft:OpenVLAOFT",
        config={"model_type": "openvla"},
        load="vla_pruner.models.openvla:load_openvla",
        random="vla_pruner.policies.random:random_openvla_oft",
        bench=Benchmark(
            feed="vla_pruner.benching.feeds:openvla_oft",
            build="vla_pruner.benching.policies:openvla",
            layers=32,
            options=("layers", "cameras", "prompt_tokens"),
        ),
        conventions={"libero": "vla_pruner.simulators.libero_conventions:openvla"},
    ),
    Row(
        name="pi0",
        title="pi0 of transformers",
        family="vla_pruner.families.pi0:PI0",
        policy="vla_pruner.policies.pi0:TransformersPI0",
        module="transformers.models.pi0.modeling_pi0:PI0ForConditionalGeneration",
        config={"model_type": "pi0"},
        load="vla_pruner.policies.pi0:load_pi0",
        random="vla_pruner.policies.random:random_pi0",
        bench=Benchmark(
            feed="vla_pruner.benching.feeds:pi0",
            build="vla_pruner.benching.policies:pi0",
            layers=18,
            options=_EXPERT_OPTIONS,
            first_layer=1,
        ),
        conventions={"libero": "vla_pruner.simulators.libero_conventions:pi0"},
    ),
    *(
        Row(
            name=f"lerobot-{kind.replace('_', '-')}",
            aliases=aliases,
            title=f"LeRobot's {kind}",
            family=f"vla_pruner.families.{family}",
            policy="vla_pruner.policies.lerobot:LeRobotPolicy",
            module=f"lerobot.policies.{kind}.modeling_{kind}:{module}",
            config={"type": kind, "model_type": None},
            load="vla_pruner.policies.lerobot:load_lerobot",
            random=f"vla_pruner.policies.lerobot_random:random_{kind}",
            bench=Benchmark(
                feed="vla_pruner.benching.feeds:lerobot",
                build="vla_pruner.benching.policies:lerobot",
                layers=layers,
                options=options,
                first_layer=first_layer,
            ),
            conventions={"libero": "vla_pruner.simulators.libero_conventions:lerobot"},
        )
        for kind, aliases, family, module, layers, options, first_layer in (
            ("pi0", (), "lerobot_pi:LeRobotPi", "PI0Policy", 18, _EXPERT_OPTIONS, 1),
            ("pi05", ("pi05",), "lerobot_pi:LeRobotPi", "PI05Policy", 18, _EXPERT_OPTIONS, 1),
            ("pi0_fast", ("pi0-fast",), "lerobot_pi0_fast:LeRobotPi0Fast", "PI0FastPolicy", 18, _DECODING_OPTIONS, 0),
            ("smolvla", ("smolvla",), "smolvla:SmolVLA", "SmolVLAPolicy", 16, _EXPERT_OPTIONS, 1),
        )
    ),
    *(
        Row(
            name=name,
            aliases=(published.lower(),),
            title=f"{published} of transformers",
            family="vla_pruner.families.vlm:VLM",
            policy=f"vla_pruner.policies.vlm:{'RandomPaliGemma2' if name == 'paligemma2' else 'RandomVLM'}",
            module=f"transformers.models.{kind}.modeling_{kind}:{classes}ForConditionalGeneration",
            random=f"vla_pruner.policies.vlm:random_{name.replace('-', '_').replace('.', '_')}",
            bench=Benchmark(
                feed="vla_pruner.benching.feeds:vlm",
                build="vla_pruner.benching.policies:vlm",
                layers=layers,
                options=("layers", "cameras", "prompt_tokens", "decode_tokens"),
            ),
        )
        for name, published, kind, classes, layers in (
            ("llava", "LLaVA-1.5-7B", "llava", "Llava", 32),
            ("paligemma", "PaliGemma-3B-224", "paligemma", "PaliGemma", 18),
            ("smolvlm", "SmolVLM2-500M", "smolvlm", "SmolVLM", 32),
            ("qwen2.5-vl", "Qwen2.5-VL-3B", "qwen2_5_vl", "Qwen2_5_VL", 36),
            ("qwen3-vl", "Qwen3-VL-2B", "qwen3_vl", "Qwen3VL", 28),
            ("llava-next", "LLaVA-v1.6-Mistral-7B", "llava_next", "LlavaNext", 32),
            ("internvl", "InternVL3-1B", "internvl", "InternVL", 24),
            ("gemma3", "Gemma-3-4B", "gemma3", "Gemma3", 34),
            ("paligemma2", "PaliGemma2-3B-224", "paligemma", "PaliGemma", 26),
            ("idefics3", "Idefics3-8B", "idefics3", "Idefics3", 32),
            ("qwen2-vl", "Qwen2-VL-2B", "qwen2_vl", "Qwen2VL", 28),
        )
    ),
    Row(
        name="lerobot-molmoact2",
        aliases=("molmoact2",),
        title="LeRobot's MolmoAct2",
        family="vla_pruner.families.molmoact2:MolmoAct2",
        policy="vla_pruner.policies.lerobot:LeRobotPolicy",
        module="lerobot.policies.molmoact2.modeling_molmoact2:MolmoAct2Policy",
        config={"type": "molmoact2", "model_type": None},
        load="vla_pruner.policies.lerobot:load_lerobot",
        random="vla_pruner.policies.molmoact2_random:random_molmoact2",
        bench=Benchmark(
            feed="vla_pruner.benching.feeds:molmoact2",
            build="vla_pruner.benching.policies:molmoact2",
            layers=36,
            options=_EXPERT_OPTIONS,
            first_layer=1,
        ),
        conventions={"libero": "vla_pruner.simulators.libero_conventions:lerobot"},
    ),
    *(
        Row(
            name=f"lerobot-{kind.replace('_', '-')}",
            aliases=(kind.replace("_", "-"),),
            title=f"LeRobot's {title}",
            family=f"vla_pruner.families.{kind}:{family}",
            policy="vla_pruner.policies.lerobot:LeRobotPolicy",
            module=f"lerobot.policies.{kind}.modeling_{kind}:{module}",
            config=None if kind == "groot" else {"type": kind, "model_type": None},
            load=None if kind == "groot" else "vla_pruner.policies.lerobot:load_lerobot",
            random=f"vla_pruner.policies.{kind}_random:random_{kind}",
            bench=bench,
        )
        for kind, title, family, module, bench in (
            (
                "groot",
                "GR00T N1.7",
                "Groot",
                "GrootPolicy",
                Benchmark(
                    feed="vla_pruner.benching.feeds:groot",
                    build="vla_pruner.benching.policies:groot",
                    layers=16,
                    options=("cameras", "prompt_tokens", "denoise_steps"),
                    first_layer=1,
                ),
            ),
            (
                "eo1",
                "EO-1",
                "EO1",
                "EO1Policy",
                Benchmark(
                    feed="vla_pruner.benching.feeds:eo1",
                    build="vla_pruner.benching.policies:eo1",
                    layers=36,
                    options=_EXPERT_OPTIONS,
                    first_layer=1,
                ),
            ),
            (
                "vla_jepa",
                "VLA-JEPA",
                "VLAJEPA",
                "VLAJEPAPolicy",
                Benchmark(
                    feed="vla_pruner.benching.feeds:vla_jepa",
                    build="vla_pruner.benching.policies:vla_jepa",
                    layers=28,
                    options=("cameras", "prompt_tokens"),
                    first_layer=1,
                ),
            ),
        )
    ),
    Row(
        name="llama",
        title="a decoder-only language model of transformers",
        family="vla_pruner.families.decoder_lm:DecoderLM",
        policy="transformers.models.llama.modeling_llama:LlamaForCausalLM",
        bench=Benchmark(
            feed="vla_pruner.benching.feeds:llama",
            build="vla_pruner.benching.policies:llama",
            options=_DECODING_OPTIONS,
        ),
    ),
)
"""The package's own, families that match more models behind those that match fewer."""


def random_names() -> tuple[str, ...]:
    """Names of the package's policies with random weights."""
    return tuple(row.name for row in ROWS if row.random is not None)


def row_named(name: str) -> Row | None:
    """Return the row of this name or alias, or None. Of other distributions only the one whose entry point has the name
    is imported.

    Raises:
        PluginError: that one cannot be used.
    """
    for row in ROWS:
        if name in (row.name, *row.aliases):
            return row
    found = (plugin for plugin in plugins(FAMILIES) if plugin.name == name)
    return next((row for row in map(foreign_row, found) if row is not None), None)


def row_of(policy: Any) -> Row | None:
    """Return the row of a policy, by its class and those that this one extends, or None."""
    foreign: list[Row] | None = None
    for name in _classes(policy):
        found = [row for row in ROWS if row.policy == name]
        if not found:
            foreign = list(_foreign_rows()) if foreign is None else foreign
            found = [row for row in foreign if row.policy == name]
        if found:
            module = _classes(getattr(policy, "module", None))
            return next((row for row in found if row.module in module), found[0])
    return None


def row_driving(module: Any) -> Row | None:
    """Return the row whose `policy` drives a bare module of another library, and can be made of it alone; or None."""
    names = _classes(module)
    return next((row for row in ROWS if row.load is not None and row.module in names), None)


def row_for(config: Mapping[str, Any]) -> Row | None:
    """Return the row of the policy that a config.json describes, or None."""
    found = next((row for row in ROWS if row.fits(config)), None)
    return found or next((row for row in _foreign_rows() if row.fits(config)), None)


def foreign_row(plugin: Plugin) -> Row | None:
    """Return the row of a family of another distribution; None: it has none.

    Raises:
        PluginError: it cannot be imported, or its `row` is no row, or one of another name.
    """
    row = getattr(plugin.load(), "row", None)
    if row is not None and not isinstance(row, Row):
        raise PluginError(f"{plugin} cannot be used: its `row` is no vla_pruner.registry.Row.")
    if row is not None and row.name != plugin.name:
        raise PluginError(f"{plugin} cannot be used: its row has the name {row.name!r}; give both one name.")
    return row


def _classes(value: Any) -> list[str]:
    return [f"{kind.__module__}:{kind.__qualname__}" for kind in type(value).__mro__[:-1]]


def _foreign_rows() -> Iterator[Row]:
    for plugin in plugins(FAMILIES):
        try:
            row = foreign_row(plugin)
        except PluginError as error:
            warnings.warn(f"{error} The other model families are used without it.", RuntimeWarning, stacklevel=4)
            continue
        if row is not None:
            yield row
