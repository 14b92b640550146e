"""Installing the stand-ins for the modules that the official scripts import, and removing them again."""

from __future__ import annotations

import atexit
import functools
import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vla_pruner.attach.session import Session
from vla_pruner.errors import OptionError, SessionError
from vla_pruner.methods import Method
from vla_pruner.official.evaluation import Evaluation
from vla_pruner.official.stand_ins import stand_ins, stopping
from vla_pruner.replacements import undo
from vla_pruner.simulators import SimulatorUnavailable
from vla_pruner.simulators.libero_package import INSTALL, load_libero
from vla_pruner.wording import a_type

_current: Installation | None = None


class Installation:
    """The stand-ins that `install` put in place. As a context manager it removes them at the end.

    Attributes:
        evaluation: the run's policy and its counts: `episodes`, `steps`, `pruned`, `kept`.
    """

    def __init__(self, evaluation: Evaluation, environment: Any) -> None:
        self.evaluation = evaluation
        self._modules = stand_ins(evaluation)
        self._methods: list[tuple[type, str, Any]] = []
        sys.modules.update(self._modules)
        self._replace(environment, "reset", evaluation.begin_episode)
        self._replace(environment, "step")
        atexit.register(self._tell)

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def session(self) -> Session | None:
        """The method's session; None until the script has loaded its model, or without a method."""
        return self.evaluation.session

    def remove(self) -> None:
        """Detach the method, and restore the modules of the process. A second call does nothing."""
        global _current
        if _current is self:
            _current = None
        modules, self._modules = self._modules, {}
        methods, self._methods = self._methods, []
        atexit.unregister(self._tell)
        undo(
            *(functools.partial(sys.modules.pop, name, None) for name in modules),
            *(functools.partial(setattr, owner, name, original) for owner, name, original in methods),
            self.evaluation.close,
        )

    def _replace(self, environment: type, name: str, then: Any = None) -> None:
        """Make the method `name` of LIBERO's environments stop the run if it fails, and call `then` if it does not."""
        owner = next(cls for cls in environment.__mro__ if name in vars(cls))
        original = vars(owner)[name]

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            if then is not None:
                then()
            return found

        self._methods.append((owner, name, original))
        setattr(owner, name, stopping(self.evaluation, call))

    def _tell(self) -> None:
        print(f"vla_pruner.official: {self.evaluation.summary()}")


def install(method: Method | None, *, policy: Any = None, **options: Any) -> Installation:
    """Make the official LIBERO scripts of OpenVLA and OpenVLA-OFT evaluate policies of this package.

    Call it at the top of the script, before its other imports. In this process, stand-ins replace the modules
    `experiments.robot.openvla_utils`, `.robot_utils` and `.libero.libero_utils` and `prismatic.vla.constants`, and the
    policy begins an episode whenever an environment of LIBERO is reset. An error in one of them, or in the environment,
    ends the run with exit code 1, because the scripts would count it as a failed episode. The counts are printed at the
    end.

    Args:
        method: the method to attach to the policy; None: no method, for the unpruned run.
        policy: a policy that is already loaded, in place of the script's `pretrained_checkpoint`.
        options: for `load_policy`, such as `dtype`. Without them the policy is on the first CUDA device if there is
            one, and `load_in_8bit`, `load_in_4bit` and `num_diffusion_steps_inference` are the script's.

    Returns:
        the installation; a script does not need it.

    Raises:
        OptionError: `method` is not a method, or both a policy and options were given.
        SessionError: it is installed already, or the script imported an official module before.
        SimulatorUnavailable: LIBERO is missing; or it is hf-libero, and lacks something or has another version.
    """
    global _current
    if method is not None and not isinstance(method, Method):
        raise OptionError(f"install was given {a_type(method)}; give a method such as VLAPruner(keep=0.25), or None.")
    if policy is not None and options:
        raise OptionError(
            f"install was given a policy and {', '.join(options)}, which are for loading one; give either."
        )
    if _current is not None:
        raise SessionError("vla_pruner.official is installed already; call remove() of what install returned first.")
    evaluation = Evaluation(method, policy, options)
    early = [name for name in stand_ins(evaluation) if name in sys.modules]
    if early:
        raise SessionError(
            f"{early[0]} was imported before vla_pruner.official.install(...), which has to stand in for it: put the "
            "two lines at the top of the script."
        )
    _current = Installation(evaluation, _environment())
    return _current


def _environment() -> Any:
    """Return LIBERO's OffScreenRenderEnv. With hf-libero, LIBERO is set up to find its data without a prompt."""
    try:
        version("hf-libero")
    except PackageNotFoundError:
        pass
    else:
        load_libero()
    try:
        return importlib.import_module("libero.libero.envs").OffScreenRenderEnv
    except ModuleNotFoundError as error:
        raise SimulatorUnavailable(f"LIBERO cannot be imported (no module named {error.name!r})", INSTALL) from error
