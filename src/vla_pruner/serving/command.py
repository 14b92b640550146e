"""`vla-pruner serve`: its flags, and a server that runs until it is stopped."""

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
from typing import Any

from vla_pruner.fate import WITHIN_A_STEP
from vla_pruner.flags import Help, add_weights, budget, check_weights
from vla_pruner.serving.observations import BY_CAMERA, LAYOUTS

KEY_VARIABLE = "VLA_PRUNER_API_KEY"


def add_serve(commands: Any) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "serve",
        description=(
            "Serves a policy, pruned, over openpi's websocket protocol: a map of images, state and prompt in, actions\n"
            "and timings out. Each connection is a robot with a memory of its own; control steps that come together\n"
            "share a forward pass. Also there: /healthz, and /metrics for Prometheus. Ctrl-C answers what is under\n"
            "way and stops, and a second one stops at once. Exit code: 0 stopped, 1 ended by itself, 2 wrong input."
        ),
        formatter_class=Help,
    )
    add = command.add_argument
    add(
        "--policy",
        metavar="MODEL",
        required=True,
        help="folder of a checkpoint, its hub name, 'reference' or 'reference:NAME' (ships with the package);\n"
        "with --random-weights a name as of audit",
    )
    add(
        "--method",
        metavar="NAME",
        default="vla-pruner",
        help="what prunes, or none; its options after colons, such as vla-pruner:window=5; a method of your own:\n"
        "my_module:MyMethod (default: %(default)s)",
    )
    add(
        "--keep",
        metavar="X",
        type=budget,
        help="visual tokens kept: a fraction such as 0.25, or a number such as 64 (default: 0.25)",
    )
    add("--layer", metavar="K", type=int, help="the pruning layer (default: 3)")
    add("--pruned", choices=WITHIN_A_STEP, help="what becomes of the others (default: drop where the method can)")
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="0.0.0.0 for all (default: %(default)s, this machine)")
    add("--port", metavar="N", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add(
        "--observations",
        choices=tuple(LAYOUTS),
        default=BY_CAMERA,
        help="keys of observations: those of openpi's LIBERO, DROID or ALOHA clients, or observation/<camera> and\n"
        "observation/state (default: %(default)s)",
    )
    add(
        "--camera-key",
        metavar="CAMERA=KEY",
        action="append",
        default=[],
        type=_pair,
        help="the key of one of the policy's cameras; may be repeated (default: as --observations has it)",
    )
    add(
        "--api-key-file",
        metavar="FILE",
        type=Path,
        help=f"holds the key that clients must send (default: the variable {KEY_VARIABLE}; without it no key)",
    )
    add("--tls-cert", metavar="FILE", type=Path, help="PEM certificate for wss:// (default: none, ws://)")
    add("--tls-key", metavar="FILE", type=Path, help="PEM key of the certificate (default: none)")
    add("--max-robots", metavar="N", type=int, default=64, help="connections at a time (default: %(default)s)")
    add("--max-waiting", metavar="N", type=int, default=64, help="control steps that may wait (default: %(default)s)")
    add("--max-message", metavar="MIB", type=int, default=16, help="of one message (default: %(default)s MiB)")
    add("--max-batch", metavar="N", type=int, default=16, help="robots in one forward pass (default: %(default)s)")
    add(
        "--batch-window",
        metavar="MS",
        type=float,
        default=2.0,
        help="how long a control step waits for those of other robots (default: %(default)g ms)",
    )
    add("--grace", metavar="S", type=float, default=30.0, help="for answers under way at the end (default: 30 s)")
    add("--compile", action="store_true", help="compile the policy before the port opens (default: off)")
    add(
        "--only-if-faster",
        action="store_true",
        help="time control steps of one robot before the port opens, unpruned and pruned in turns, and serve the\n"
        "policy unpruned where pruning is not faster (default: off)",
    )
    add(
        "--prompt",
        metavar="TEXT",
        action="append",
        default=[],
        help="an instruction to run, and compile, beforehand; may be repeated (default: one that the policy knows)",
    )
    add(
        "--default-prompt",
        metavar="TEXT",
        help="the instruction of observations that have none, as openpi's ALOHA clients send (default: refused)",
    )
    add(
        "--episode-gap",
        metavar="S",
        type=float,
        help="silence of a robot after which its next observation begins an episode: openpi's clients say no reset\n"
        "(default: only 'reset' and another prompt begin one)",
    )
    add(
        "--episode-jump",
        metavar="X",
        type=float,
        help="change of one number of a robot's state that begins an episode (default: none does)",
    )
    add(
        "--action-dim",
        metavar="N",
        type=int,
        help="send the first N numbers of an action (default: libero 7, droid 8, aloha 14, cameras all)",
    )
    add("--action-horizon", metavar="N", type=int, help="send the first N actions of a chunk (default: all)")
    add(
        "--no-center-crop",
        action="store_true",
        help="OpenVLA and OFT with --observations libero: trained without image augmentation (default: with)",
    )
    add(
        "--metadata",
        metavar="FILE",
        type=Path,
        help='JSON object that clients are told when they connect, such as {"reset_pose": [...]} (default: none)',
    )
    add("--threads", metavar="N", type=int, help="of torch on the CPU (default: torch's)")
    add("--seed", metavar="N", type=int, default=0, help="of what the policy draws (default: %(default)s)")
    add_weights(command)
    command.set_defaults(run=run_serve)


def run_serve(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code.

    Raises:
        VLAPrunerError: the flags do not go together, or the extra "serve" is not installed.
    """
    _check_installed()
    from vla_pruner.serving.doors import check_address, tls_context
    from vla_pruner.serving.logs import told_operator
    from vla_pruner.serving.server import PolicyServer
    from vla_pruner.serving.settings import ServerSettings
    from vla_pruner.terminal import output, waiting

    settings = ServerSettings(
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
    method = _method(options)
    tls_context(settings)
    asyncio.run(check_address(settings))  # refused now, and not after the policy is loaded
    with waiting(output(stderr=True), f"loading {options.policy}"):
        policy = _policy(options)
    server = PolicyServer(policy, method, settings)
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
        _say(f"Loaded {options.policy}; warming up{' and compiling' if options.compile else ''}.")
        server.start()
        if settings.is_open:
            _say(
                f"Warning: {settings.host} can be reached by other machines, and no key is asked of them: anyone "
                f"who reaches the port can use the policy. Give --api-key-file (or {KEY_VARIABLE}), and --tls-cert "
                "beyond a network that you trust."
            )
        what = "unpruned" if method is None else f"{type(method).__name__}, keep {method.keep!r}"
        _say(f"Serving {options.policy} ({what}) at {server.url}; Ctrl-C stops.")
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

    if options.threads is not None:
        from vla_pruner.errors import OptionError

        if options.threads < 1:
            raise OptionError(f"--threads is {options.threads}; it is 1 or more.")
        torch.set_num_threads(options.threads)
    check_weights(options)
    if options.random_weights:
        from vla_pruner.policies.options import as_dtype, usable_device
        from vla_pruner.policies.random import random_policy

        usable_device(options.device)
        dtype = as_dtype(options.dtype) or torch.float32
        return random_policy(options.policy, options.size or "tiny", options.device, dtype, options.seed)
    from vla_pruner.policies.loading import load_policy

    return load_policy(options.policy, options.device, options.dtype, **dict(options.option))


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


def _pair(text: str) -> tuple[str, str]:
    camera, equals, key = text.partition("=")
    if not equals or not camera or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not CAMERA=KEY")
    return camera, key


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
