"""`python -m benchmarks.gpu`, except that the process of an item is forked from this one: importing torch and
transformers anew for each takes longer than what a dry run does in it. How a process is started and killed is tested by
others, and so is what a new one imports.

    python -m tests.gpu.forked --out DIR --dry
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest  # noqa: F401  what is imported here need not be in each process
import torch._dynamo  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.pi0.modeling_pi0  # noqa: F401

import vla_pruner.benching.run
import vla_pruner.models.openvla  # noqa: F401
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import child


class Forked:
    """A forked process, as far as `benchmarks.gpu` uses one of `subprocess`."""

    def __init__(self, command: list[str], log: Path) -> None:
        assert command[:3] == [sys.executable, "-m", "benchmarks.gpu.child"]
        self._code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(command[3:], log)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= end:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.02)
        return code


def _become(arguments: list[str], log: Path) -> None:
    """Run an item, and end as a process of its own would."""
    os.setsid()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    code = 1
    try:
        code = child.main(arguments)
    except SystemExit as stopped:
        print(stopped.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    gpu.start = Forked  # type: ignore[assignment]
    sys.exit(gpu.main())
