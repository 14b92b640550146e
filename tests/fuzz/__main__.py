"""Run the fuzzers that are named, and exit with 1 if one of them finds a fault."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

KINDS = {
    "folders": "checkpoint folders, loaded and asked for an action",
    "messages": "messages to the policy server",
    "records": "files of runs, recordings and data sets, read by the commands",
}


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    for kind, what in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N", help=f"{what}: N of them, spoilt")
    parser.add_argument("--seed", type=int, default=0, help="of what is spoilt, and how")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    found = 0
    for kind in KINDS:
        count = getattr(options, kind)
        if count > 0:
            faults: list[str] = importlib.import_module(f"tests.fuzz.{kind}").run(count, options.seed)
            print(f"{kind}: {count} tried, {len(faults)} faults")
            for fault in faults:
                print(f"  {fault}")
            found += len(faults)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
