"""Puts a trained checkpoint into the package: `python -m reference.export --name full2`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from reference.store import DATA_ROOT
from vla_pruner.models.reference.loading import SHIPPED_WEIGHTS, load_autoregressive_policy, save_policy
from vla_pruner.simulators.metaworld import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="the checkpoint, a folder that reference.train wrote")
    parser.add_argument("--checkpoints", type=Path, default=DATA_ROOT / "checkpoints")
    parser.add_argument("--out", type=Path, default=SHIPPED_WEIGHTS)
    args = parser.parse_args()
    policy = load_autoregressive_policy(args.checkpoints / args.name)
    policy.config = replace(policy.config, tasks=tuple(TASKS.items()))  # the shipped tasks, not all that were tried
    save_policy(policy, args.out)
    print(f"{args.out}: {(args.out / 'model.safetensors').stat().st_size / 1e6:.1f} MB, tasks {', '.join(TASKS)}")


if __name__ == "__main__":
    main()
