"""One file per model family, with the places of its parts and tokens. Nothing here knows a method.

A family is found by looking at the model; no library is imported for a family of ours that is not in use. Families of
other distributions (entry points of the group `vla_pruner.families`) are asked first.
"""

from __future__ import annotations

import inspect
import warnings
from functools import lru_cache
from typing import Any

from torch import nn

from vla_pruner import plugins
from vla_pruner.attach.family import Family
from vla_pruner.errors import OptionError, PluginError, UnsupportedModelError
from vla_pruner.families.refused import check_not_refused
from vla_pruner.families.wrappers import is_compiled, unwrapped
from vla_pruner.registry import ROWS


def family_of(model: Any, *, family: type[Family] | None = None, **options: Any) -> Family:
    """Return the family adapter for `model`: a module, or a policy whose `module` is one, also inside wrappers. A
    policy may be a module itself, with `act`.

    Args:
        family: the adapter to use instead of a search; it must match the model.

    Raises:
        UnsupportedModelError: no family knows this model, or this version or attention backend of it; or `family` is
            none or does not know it; or families of two distributions both know it.
        OptionError: the options are not those of the family.
    """
    named: Any = None
    given, policy = model, unwrapped(model)  # wrappers may hand out `act` and `module` of what is inside
    drives = not isinstance(policy, nn.Module) or callable(getattr(policy, "act", None))
    if drives and isinstance(getattr(policy, "module", None), nn.Module):
        named, tokens = getattr(policy, "cameras", None), getattr(policy, "camera_tokens", None)
        named = dict(zip(named, tokens, strict=True)) if named is not None and tokens is not None else named
        given = policy.module
    model = unwrapped(given)
    found: Any = _found(model) if family is None else _given(family, model)
    known = list(inspect.signature(found.__init__).parameters)[2:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise OptionError(
            f"attach was given {', '.join(unknown)}; for {type(model).__name__} it takes "
            f"{', '.join(known) or 'no options'}."
        )
    if named is not None and "cameras" in known:
        options = {"cameras": named, **options}
    made = found(model, **options)
    if is_compiled(given) and made.called:
        raise UnsupportedModelError(
            f"torch.compile made a {type(given).__name__} of {type(model).__name__}, whose calls no hook sees; attach "
            "to the model inside (its _orig_mod) and call that, with attach(..., compile=True) for compiled calls."
        )
    return made


def _given(family: Any, model: Any) -> type[Family]:
    if not isinstance(family, type) or not issubclass(family, Family):
        raise UnsupportedModelError(
            f"family={family!r} was given; it is a class that extends vla_pruner.attach.family.Family."
        )
    if not isinstance(model, nn.Module) or not family.matches(model):
        raise UnsupportedModelError(
            f"family={family.__name__} was given, but its matches() does not know {type(model).__module__}."
            f"{type(model).__name__}."
        )
    return family


def _found(model: Any) -> type[Family]:
    foreign, broken = _foreign(model)
    if foreign is not None:
        return foreign
    check_not_refused(model)
    for path in dict.fromkeys(row.family for row in ROWS):
        family: Any = plugins.class_at(path)
        if family.matches(model):
            return family
    raise UnsupportedModelError(
        f"{type(model).__module__}.{type(model).__name__} was given{_part(model)}; supported are OpenVLA and "
        "OpenVLA-OFT as vla_pruner.load_policy loads them, PI0ForConditionalGeneration of transformers, "
        "LeRobot's PI0Policy, PI05Policy, PI0FastPolicy, SmolVLAPolicy, MolmoAct2Policy, GrootPolicy, EO1Policy and "
        "VLAJEPAPolicy, vla_pruner.reference_policy(), transformers' vision-language models that are called with "
        "input_ids and pixel_values (LLaVA, PaliGemma, SmolVLM, InternVL, Gemma 3, Qwen-VL), and its decoder-only "
        "language models. Adapters of PEFT, DistributedDataParallel and FullyShardedDataParallel are looked into; a "
        "policy inside of another wrapper, such as DataParallel, is attached to itself (its .module). "
        "See CONTRIBUTING.md on how a family is added." + "".join(f" {told}" for told in broken)
    )


def _part(model: Any) -> str:
    """Return what to attach to if a policy of the user's own holds a model that is supported; else nothing."""
    if not isinstance(model, nn.Module) or type(model).__module__.partition(".")[0] in ("lerobot", "transformers"):
        return ""  # the parts of those policies are not called as models of their own
    for name, part in list(model.named_modules())[1:]:
        for path in dict.fromkeys(row.family for row in ROWS):
            family: Any = plugins.class_at(path)
            if family.matches(part):
                dotted = all(word.isidentifier() for word in name.split("."))
                place = f"policy.{name}" if dotted else f"policy.get_submodule({name!r})"
                visual = ", visual=slice(start, stop)" if "visual" in inspect.signature(family).parameters else ""
                return (
                    f", which holds a {type(part).__name__}: if it calls that as a whole, attach to it, "
                    f"attach({place}{visual}) (docs/vlm.md)"
                )
    return ""


def _foreign(model: Any) -> tuple[type[Family] | None, list[str]]:
    """Return the family of another distribution that matches a model, and sentences on those that failed."""
    found: dict[type[Family], plugins.Plugin] = {}
    broken: list[str] = []
    for plugin in plugins.plugins(plugins.FAMILIES):
        try:
            family = _loaded(plugin)
            if family.matches(model):
                found.setdefault(family, plugin)
        except Exception as error:  # third-party code, and the models of all other families must work on
            told = str(error) if isinstance(error, PluginError) else f"{plugin} fails: {type(error).__name__}: {error}."
            warnings.warn(f"{told} The other model families are used without it.", RuntimeWarning, stacklevel=4)
            broken.append(told)
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} is known to {' and to '.join(map(str, found.values()))}; uninstall one, or "
            "say which with attach(model, family=...)."
        )
    return next(iter(found), None), broken


@lru_cache(maxsize=64)
def _loaded(plugin: plugins.Plugin) -> type[Family]:
    family = plugin.load()
    if not issubclass(family, Family):
        raise PluginError(f"{plugin} is no family: it does not extend vla_pruner.attach.family.Family.")
    return family
