"""The errors that this package raises on purpose. Each message says what was found, what is supported and what to
do.
"""


class VLAPrunerError(Exception):
    """Base class of every error that this package raises on purpose."""


class UnsupportedModelError(VLAPrunerError, TypeError):
    """The model, its version, its attention backend or its cache cannot be pruned."""


class OptionError(VLAPrunerError, ValueError):
    """An option of a method, a model or a command is unknown or out of its range, or does not go with another one."""


class BudgetError(OptionError):
    """`keep`, `layer` or another option that decides how many tokens stay does not fit, by itself or for this model."""


class SessionError(VLAPrunerError, RuntimeError):
    """A session is used in a way that would give wrong results: attached twice, detached, or with another batch
    size.
    """


class CheckpointError(VLAPrunerError, ValueError):
    """A checkpoint folder is incomplete, damaged, or holds other weights than the model has."""


class ObservationError(VLAPrunerError, ValueError):
    """A policy was given images, an instruction or a proprioceptive state that do not fit it."""


class PluginError(VLAPrunerError, ImportError):
    """A method or a family from outside of this package cannot be imported, or is no method or family."""
