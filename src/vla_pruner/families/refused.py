"""Policies that are known and, for a reason, not supported; the error gives this reason instead of a general one.

They are recognised by the names of their classes, so nothing that they need has to be installed.
"""

from __future__ import annotations

from torch import nn

from vla_pruner.errors import UnsupportedModelError

XVLA = (
    "LeRobot's X-VLA is not supported: its transformer adds a learned position to every token by its place in the "
    "sequence, so dropping tokens would shift all those behind them to places that they were not trained for, and give "
    "wrong actions without an error. Little would be gained: a view is 50 tokens, and most of the cost is the vision "
    "encoder before them. Run it without a session."
)
WALL_X = (
    "LeRobot's WALL-X is not supported: it runs its whole prompt again in each of its ten denoising passes, although "
    "nothing before the actions depends on the noise. An exact cache of the keys and values of that prefix makes a "
    "control step about 4 times cheaper in FLOPs and changes no action, where dropping three quarters of its visual "
    "tokens would make it about 1.7 times cheaper. Cache the prefix instead, and run it without a session."
)
REASONS = {
    ("lerobot.policies.xvla.modeling_xvla", "XVLAPolicy"): XVLA,
    ("lerobot.policies.xvla.modeling_xvla", "XVLAModel"): XVLA,
    ("lerobot.policies.wall_x.modeling_wall_x", "WallXPolicy"): WALL_X,
    ("lerobot.policies.wall_x.modeling_wall_x", "Qwen2_5_VLMoEForAction"): WALL_X,
}
"""Reasons by module and name of the class."""
GROOT = (
    "LeRobot's GR00T N1.7 is pruned, but not loaded from a folder: LeRobot builds it from a second checkpoint, that of "
    "its base model (base_model_path in config.json), and its preprocessor lets the tokenizer that it fetches run code "
    "of its own. Load it with LeRobot if you trust both, GrootPolicy.from_pretrained(FOLDER), and attach to that: "
    'VLAPruner(keep=0.25, pruned="drop").attach(policy).'
)
NOT_LOADED = {"xvla": XVLA, "wall_x": WALL_X, "groot": GROOT}
"""Reasons by the type in a LeRobot checkpoint's config.json."""


def check_not_refused(model: nn.Module) -> None:
    """Raise UnsupportedModelError, with the reason, if a model is one of these policies."""
    for kind in type(model).__mro__:
        reason = REASONS.get((kind.__module__, kind.__name__))
        if reason is not None:
            raise UnsupportedModelError(reason)
