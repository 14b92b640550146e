"""Capacity of the policy server: throughput and latency against the number of robots, over real websockets.

    python -m benchmarks.serving --out benchmarks/results/serving/reference-cpu-1-thread

The server runs in this process and all robots in another one. Each robot asks again as soon as it has its answer, so
the server is never idle; a robot that acts between its questions leaves room for others. The last arm, without batches,
runs with the two largest numbers of robots alone. `--out` gets serving.json (every row, and on what it was measured)
and serving.md (the table).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import connect

from vla_pruner import markdown
from vla_pruner.client.codec import pack, unpack
from vla_pruner.conditions import machine_conditions
from vla_pruner.statistics import percentile

FIRST = 6
"""Control steps of each robot that are not counted: unpruned ones, and those before all robots are there."""
PACKAGES = ("vla-pruner", "torch", "transformers", "numpy", "websockets", "msgpack")
TITLES = ("arm", "robots", "steps/s", "latency ms p50", "p90", "p99", "pass ms p50", "robots a pass", "kept")


@dataclass(frozen=True)
class Row:
    """One arm with one number of robots; times are milliseconds.

    Attributes:
        latency: of a control step as the robot sees it, from before it is packed to after it is unpacked.
        inference: of the forward pass that a step had part in.
        batch: robots that shared a pass, on average over steps.
        kept: visual tokens that were kept, the mean.
    """

    arm: str
    robots: int
    steps: int
    seconds: float
    steps_per_second: float
    latency: dict[str, float]
    inference: dict[str, float]
    batch: float
    kept: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every arm with every number of robots; the exit code is 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--robots", metavar="N,M", default="1,2,4,8,16,32", help="numbers of robots (default: %(default)s)")
    add("--seconds", metavar="S", type=float, default=8.0, help="of each row (default: %(default)g)")
    add("--keep", metavar="X", type=float, default=0.25, help="of the pruned arms (default: %(default)g)")
    add("--max-batch", metavar="N", type=int, default=32, help="robots in a pass (default: %(default)s)")
    add("--threads", metavar="N", type=int, default=1, help="of torch (default: %(default)s)")
    add("--device", metavar="D", default="cpu", help="(default: %(default)s)")
    add("--out", metavar="DIR", type=Path, required=True, help="folder for serving.json and serving.md")
    options = parser.parse_args(arguments)
    import torch

    import vla_pruner as vp

    torch.set_num_threads(options.threads)
    conditions = machine_conditions(PACKAGES)
    policy = vp.reference_policy("autoregressive", options.device)
    pruned = vp.VLAPruner(keep=options.keep, preset="paper")
    arms = (
        ("unpruned", None, options.max_batch),
        (f"vla-pruner {options.keep:g}", pruned, options.max_batch),
        (f"vla-pruner {options.keep:g}, one at a time", pruned, 1),
    )
    rows: list[Row] = []
    numbers = [int(word) for word in options.robots.split(",")]
    for name, method, batch in arms:
        for robots in numbers if batch > 1 else numbers[-2:]:
            rows.append(measure(name, policy, method, robots, batch, options.seconds))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    found = {"settings": settings, "conditions": conditions, "rows": [asdict(row) for row in rows]}
    (options.out / "serving.json").write_text(json.dumps(found, indent=2) + "\n")
    (options.out / "serving.md").write_text(to_markdown(rows))
    print(to_markdown(rows), end="")
    return 0


def measure(name: str, policy: Any, method: Any, robots: int, max_batch: int, seconds: float) -> Row:
    """One row: a fresh server, and a process with `robots` robots for so many seconds."""
    from vla_pruner.serving import PolicyServer, ServerSettings

    settings = ServerSettings(port=0, max_batch=max_batch)
    with PolicyServer(policy, method, settings) as server:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        observation = _observation(policy)
        process = context.Process(target=_robots, args=(server.url, robots, seconds, observation, sender))
        process.start()
        steps, elapsed = receiver.recv()
        process.join()
    latency, inference, batch, kept = (list(column) for column in zip(*steps, strict=True))
    return Row(
        arm=name,
        robots=robots,
        steps=len(steps),
        seconds=round(elapsed, 3),
        steps_per_second=len(steps) / elapsed,
        latency=_quantiles(latency),
        inference=_quantiles(inference),
        batch=float(np.mean(batch)),
        kept=float(np.mean(kept)),
    )


def _observation(policy: Any) -> dict[str, Any]:
    """Return an observation. Its size decides the cost; the images' content does not matter."""
    side = policy.image_size
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    state = np.asarray(policy.config.proprio_mean, np.float32)
    return {"observation/image": image, "observation/state": state, "prompt": policy.instructions[0]}


def _robots(url: str, robots: int, seconds: float, observation: dict[str, Any], sender: Any) -> None:
    sender.send(asyncio.run(_all(url, robots, seconds, observation)))


async def _all(
    url: str, robots: int, seconds: float, observation: dict[str, Any]
) -> tuple[list[tuple[float, ...]], float]:
    ready, begin = asyncio.Semaphore(0), asyncio.Event()
    end = [0.0]
    drives = [asyncio.create_task(_drive(url, observation, ready, begin, end)) for _ in range(robots)]
    for _ in drives:
        await ready.acquire()
    start = time.perf_counter()
    end[0] = start + seconds
    begin.set()
    found = [step for steps in await asyncio.gather(*drives) for step in steps]
    return found, seconds


async def _drive(
    url: str, observation: dict[str, Any], ready: asyncio.Semaphore, begin: asyncio.Event, end: list[float]
) -> list[tuple[float, ...]]:
    """A robot; its steps that were answered in time: latency, inference, batch, kept tokens."""
    steps = []
    async with connect(url, compression=None, max_size=None) as socket:
        await socket.recv()
        for _ in range(FIRST):
            await socket.send(pack(observation))
            await socket.recv()
        ready.release()
        await begin.wait()
        while True:
            start = time.perf_counter()
            await socket.send(pack(observation))
            reply = unpack(await socket.recv())  # type: ignore[arg-type]
            done = time.perf_counter()
            if done > end[0]:
                return steps
            timing = reply["policy_timing"]
            batch = reply["server_timing"]["batch_robots"]
            steps.append((1e3 * (done - start), timing["infer_ms"], batch, timing["kept_tokens"]))


def _quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{share}": round(percentile(values, share), 3) for share in (50, 90, 99)}


def _cells(row: Row) -> tuple[str, ...]:
    times = (f"{row.latency[share]:.1f}" for share in ("p50", "p90", "p99"))
    last = (f"{row.inference['p50']:.1f}", f"{row.batch:.1f}", f"{row.kept:.0f}")
    return (row.arm, str(row.robots), f"{row.steps_per_second:.1f}", *times, *last)


def _line(row: Row) -> str:
    return "  ".join(f"{title} {cell}" for title, cell in zip(TITLES, _cells(row), strict=True))


def to_markdown(rows: Sequence[Row]) -> str:
    """The table."""
    return markdown.table(TITLES, map(_cells, rows)) + "\n"


if __name__ == "__main__":
    sys.exit(main())
