"""The flags of `vla-pruner serve`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vla_pruner.fate import WITHIN_A_STEP
from vla_pruner.flags import Help, Pairs, add_weights, budget
from vla_pruner.policies.reference_names import CHECKPOINT
from vla_pruner.serving.command import run_serve
from vla_pruner.serving.observations import BY_CAMERA, LAYOUTS
from vla_pruner.serving.settings import KEY_VARIABLE


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
    _add_policy(command)
    _add_admission(command)
    _add_limits(command)
    _add_messages(command)
    _add_start(command)
    add_weights(command)
    command.set_defaults(run=run_serve)


def _add_policy(command: argparse.ArgumentParser) -> None:
    """Add the flags for what acts: the policy, and what prunes it."""
    add = command.add_argument
    add(
        "--policy",
        metavar="MODEL",
        required=True,
        help=f"{CHECKPOINT};\nwith --random-weights a name as of audit",
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
    add(
        "--pruned",
        choices=WITHIN_A_STEP,
        help="what becomes of the others (default: as the method has it: vla-pruner freezes, the others drop)",
    )


def _add_admission(command: argparse.ArgumentParser) -> None:
    """Add the flags for where the server listens, and to whom."""
    add = command.add_argument
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="0.0.0.0 for all (default: %(default)s, this machine)")
    add("--port", metavar="N", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add(
        "--api-key-file",
        metavar="FILE",
        type=Path,
        help=f"holds the key that clients must send (default: the variable {KEY_VARIABLE}; without it no key)",
    )
    add("--tls-cert", metavar="FILE", type=Path, help="PEM certificate for wss:// (default: none, ws://)")
    add("--tls-key", metavar="FILE", type=Path, help="PEM key of the certificate (default: none)")


def _add_limits(command: argparse.ArgumentParser) -> None:
    """Add the flags for what is allowed at a time, and how long it may take."""
    add = command.add_argument
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


def _add_messages(command: argparse.ArgumentParser) -> None:
    """Add the flags for what clients send and are sent, and for what begins an episode."""
    add = command.add_argument
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
        action=Pairs,
        default=[],
        type=_pair,
        help="the key of one of the policy's cameras; may be repeated (default: as --observations has it)",
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


def _add_start(command: argparse.ArgumentParser) -> None:
    """Add the flags for what happens before the port opens."""
    add = command.add_argument
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
    add("--threads", metavar="N", type=int, help="of torch on the CPU (default: torch's)")
    add("--seed", metavar="N", type=int, default=0, help="of what the policy draws (default: %(default)s)")


def _pair(text: str) -> tuple[str, str]:
    camera, equals, key = text.partition("=")
    if not equals or not camera or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not CAMERA=KEY")
    return camera, key
