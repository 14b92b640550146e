"""`vla-pruner serve`: from the flags to a server that runs until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_pruner.flags import check_weights
from vla_pruner.serving.settings import KEY_VARIABLE, ServerSettings

if TYPE_CHECKING:
    from vla_pruner.serving.server import PolicyServer


def run_serve(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code.

    Raises:
        VLAPrunerError: the flags do not go together, or the extra "serve" is not installed.
    """
    _check_installed()
    from vla_pruner.serving.doors import check_address, tls_context
    from vla_pruner.serving.server import PolicyServer
    from vla_pruner.terminal import output, waiting

    settings = _settings(options)
    method = _method(options)
    tls_context(settings)
    asyncio.run(check_address(settings))  # refused now, and not after the policy is loaded
    with waiting(output(stderr=True), f"loading {options.policy}"):
        policy = _policy(options)
    pruner = "unpruned" if method is None else f"{type(method).__name__}, keep {method.keep!r}"
    return _serve(PolicyServer(policy, method, settings), settings, pruner)


def _settings(options: argparse.Namespace) -> ServerSettings:
    return ServerSettings(
        host=options.host,
        port=options.port,
        api_key=_api_key(options.api_key_file),
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
        observations=options.observations,
        camera_keys=dict(options.camera_key),
        max_robots=options.max_robots,
        max_waiting=options.max_waiting,
        max_message=options.max_message * 2**20,
        max_batch=options.max_batch,
        batch_window=options.batch_window / 1e3,
        grace=options.grace,
        seed=options.seed,
        prompts=tuple(options.prompt),
        compile=options.compile,
        only_if_faster=options.only_if_faster,
        name=options.policy,
        metadata=_metadata(options.metadata),
        default_prompt=options.default_prompt,
        episode_gap=options.episode_gap,
        episode_jump=options.episode_jump,
        action_dim=options.action_dim,
        action_horizon=options.action_horizon,
        center_crop=not options.no_center_crop,
    )


def _serve(server: PolicyServer, settings: ServerSettings, pruner: str) -> int:
    """Warm up, open the port and serve until SIGINT or SIGTERM; return the exit code.

    Args:
        server: not started yet.
        settings: of the server.
        pruner: what prunes the policy, for the operator.
    """
    from vla_pruner.serving.logs import told_operator

    stop = threading.Event()

    def end(*_: object) -> None:
        stop.set()
        for number in before:
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once, also during the warm-up

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    told = ExitStack()
    for number in before:
        signal.signal(number, end)
    try:
        told.enter_context(told_operator())
        _say(f"Loaded {settings.name}; warming up{' and compiling' if settings.compile else ''}.")
        server.start()
        if settings.is_open:
            _say(
                f"Warning: {settings.host} can be reached by other machines, and no key is asked of them: anyone "
                f"who reaches the port can use the policy. Give --api-key-file (or {KEY_VARIABLE}), and --tls-cert "
                "beyond a network that you trust."
            )
        _say(f"Serving {settings.name} ({pruner}) at {server.url}; Ctrl-C stops.")
        while not stop.wait(1.0):
            if server.failure is not None:
                _say(f"The server ended by itself: {type(server.failure).__name__}: {server.failure}")
                return 1
        _say("Stopping: answering what is under way.")
    finally:
        server.stop()
        told.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _method(options: argparse.Namespace) -> Any:
    if options.method == "none":
        given = [f"--{name}" for name in ("keep", "layer", "pruned") if getattr(options, name) is not None]
        if given:
            from vla_pruner.errors import OptionError

            raise OptionError(f"--method is none, which prunes nothing; leave {' and '.join(given)} out.")
        return None
    from vla_pruner.method_names import LAYER, methods_of

    pruned = None if options.pruned is None else (options.pruned,)
    keep = None if options.keep is None else (options.keep,)
    layers = LAYER if options.layer is None else (options.layer,)
    (made,) = methods_of((options.method,), keep, layers, pruned)
    return made.method


def _policy(options: argparse.Namespace) -> Any:
    import torch

    from vla_pruner.policies.asked import asked_policy

    if options.threads is not None:
        from vla_pruner.errors import OptionError

        if options.threads < 1:
            raise OptionError(f"--threads is {options.threads}; it is 1 or more.")
        torch.set_num_threads(options.threads)
    check_weights(options)
    return asked_policy(
        options.policy,
        random_weights=options.random_weights,
        size=options.size,
        device=options.device,
        dtype=options.dtype,
        options=dict(options.option),
        seed=options.seed,
    )


def _api_key(file: Path | None) -> str | None:
    """Read it from a file or the environment, never from the command line, which all users of the machine can read."""
    from vla_pruner.serving.errors import ServingError

    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ServingError(f"--api-key-file is {file}, which cannot be read ({reason}).") from error


def _metadata(file: Path | None) -> dict[str, Any]:
    from vla_pruner.serving.errors import ServingError

    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ServingError(f"--metadata is {file}, which cannot be read as JSON ({reason}).") from error
    if not isinstance(found, dict):
        raise ServingError(f'--metadata is {file}, which holds no JSON object; write {{"name": value}} into it.')
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _check_installed() -> None:
    from vla_pruner.serving.errors import ServingError
    from vla_pruner.wording import install

    for module in ("websockets", "msgpack", "prometheus_client"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            raise ServingError(
                f"Serving needs {error.name}, which is not installed; run: {install('serve')}"
            ) from error
    from websockets import exceptions, version

    if not hasattr(exceptions, "TooManyFragments"):
        raise ServingError(
            f"Serving needs websockets 17.4 or later, and {version.version} is installed, which lets one message "
            f"consist of any number of fragments; run: {install('serve')}"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
