"""Trains the reference policy in three stages on the CPU; each is resumable and ends after a budget of minutes.

`python -m reference.train vision --minutes 20`: the image encoder learns to tell object and goal positions.
`python -m reference.train pooled --minutes 15`: everything, on 2 x 2-pooled visual tokens: four times shorter prompts.
`python -m reference.train full --minutes 40`: everything, on all visual tokens.

A stage starts from the checkpoint of `--start` (default: the stage before) unless its own checkpoint exists and is
unfinished; the learning rate follows the share of the budget that was used.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reference.dataset import Batch, Dataset
from reference.heads import TrainingHeads
from reference.packing import action_loss, packed_forward, pool_grid, suffix_layout, to_bins
from reference.store import DATA_ROOT, load_frames
from vla_pruner.models.reference.configuration import ReferenceConfig
from vla_pruner.models.reference.loading import save_policy
from vla_pruner.models.reference.network import ReferencePolicy
from vla_pruner.models.reference.tokenizer import vocabulary
from vla_pruner.simulators.metaworld import TASKS

STAGES = ("vision", "pooled", "full")
_SECONDS_BETWEEN_SAVES = 60
_PARTNER_SECONDS = 20


class Partner:
    """Two processes that train the same model on different batches and keep averaging their weights.

    On two cores this is faster than two threads in one process, whose small operations would wait for each other, and
    neither process ever waits: each takes the weights that the other last wrote.
    """

    def __init__(self, path: Path, worker: int) -> None:
        self.path, self.worker = path, worker
        self.shared: np.memmap | None = None

    def exchange(self, parameters: list[torch.nn.Parameter]) -> None:
        """Publish these weights and move half way to the other's, if it has written lately."""
        flat = torch.nn.utils.parameters_to_vector(parameters).detach()
        if self.shared is None:
            size = 2 * (flat.numel() + 1)
            if not self.path.exists() or self.path.stat().st_size != 8 * size:
                np.zeros(size).tofile(self.path)
            self.shared = np.memmap(self.path, np.float64, "r+", shape=(2, flat.numel() + 1))
        mine, theirs = self.shared[self.worker], self.shared[1 - self.worker]
        mine[1:] = flat.numpy()
        mine[0] = time.time()
        if time.time() - theirs[0] < _PARTNER_SECONDS:
            flat.lerp_(torch.from_numpy(theirs[1:].astype(np.float32)), 0.5)
            torch.nn.utils.vector_to_parameters(flat, parameters)


class Trainer:
    """One stage of training: its model, its data and its loop."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed + args.worker)
        self.args = args
        self.stage: str = args.stage
        self.config = ReferenceConfig(words=vocabulary(TASKS.values()), tasks=tuple(TASKS.items()))
        self.policy, self.heads = ReferencePolicy(self.config), TrainingHeads(self.config)
        self.folder: Path = args.out
        self.path = self.folder / f"{args.name or self.stage}.pt"
        self.elapsed, self.step = 0.0, 0
        self.encoder_factor = 1.0 if self.stage == "vision" else args.encoder_rate
        saved = self._load()
        self.average = copy.deepcopy(self.policy).eval()
        self.optimizer = self._optimizer()
        if saved is not None and saved["stage"] == self.stage and "optimizer" in saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average.load_state_dict(saved["average"])
        self.data = self._data()
        self.partner = Partner(self.path.with_suffix(".shared"), args.worker) if args.pair else None
        self.layout = suffix_layout(self.config, args.suffixes, self.stage == "pooled")

    def _load(self) -> dict | None:
        """Continue this stage if it is unfinished, else start from the stage before."""
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            if saved["elapsed"] < 60 * self.args.minutes:
                self.policy.load_state_dict(saved["policy"])
                self.heads.load_state_dict(saved["heads"])
                self.elapsed, self.step = saved["elapsed"], saved["step"]
                print(f"continuing {self.path} at step {self.step}, {self.elapsed / 60:.1f} min")
                return saved
        start = self.args.start
        if start is None and self.stage != "vision":
            start = STAGES[STAGES.index(self.stage) - 1]
        if start is None:
            return None
        saved = torch.load(self.folder / f"{start}.pt", weights_only=True)
        self.policy.load_state_dict(saved["average"])
        self.heads.load_state_dict(saved["heads"], strict=False)
        print(f"starting from {start}.pt")
        return None

    def _optimizer(self) -> torch.optim.Optimizer:
        encoder = list(self.policy.vision.parameters())
        rest = [p for name, p in self.policy.named_parameters() if not name.startswith("vision.")]
        groups = [
            {"params": rest + list(self.heads.parameters()), "factor": 1.0},
            {"params": encoder, "factor": self.encoder_factor},
        ]
        return torch.optim.AdamW(groups, lr=self.args.rate, betas=(0.9, 0.98), weight_decay=0.01)

    def _data(self) -> Dataset:
        frames = load_frames(self.args.data, list(TASKS))
        print(f"{len(frames.images)} frames, {int(frames.fresh.sum())} of them from DAgger", flush=True)
        return Dataset(frames, self.config, self.args.seed + self.step + 1_000_000 * self.args.worker)

    def _set_rate(self) -> float:
        done = min(1.0, self.elapsed / (60 * self.args.minutes))
        scale = min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.rate * scale * group["factor"]
        return done

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return the stage's loss and the figures to print."""
        tokens, scene, finding, found = self._see(self.policy, batch)
        numbers = {"scene cm": 10 * scene.item() ** 0.5, "find": finding.item(), "found": found.item()}
        seeing = scene + self.args.find_weight * finding
        if self.stage == "vision":
            return seeing, numbers
        bins = to_bins(batch.actions, self.config.num_bins)
        visual = self._visual(self.policy, tokens)
        logits, hidden = packed_forward(self.policy, visual, batch.text, batch.proprio, bins, self.layout)
        acting = action_loss(logits, batch.actions, self.policy.bin_values)
        places = F.mse_loss(self.heads.state(hidden), batch.positions[:, None].expand(-1, hidden.shape[1], -1))
        numbers |= {"ce": acting.item(), "cm": 10 * places.item() ** 0.5}
        return acting + self.args.state_weight * (places + seeing), numbers

    def _see(self, policy: ReferencePolicy, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The encoder's tokens (B, M, W), the error of positions read from them, and finding's loss and success."""
        encoder = policy.vision
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_factor > 0):
            patches = encoder.patches(policy.pixels(self.data.images(batch.rows)))
            tokens = encoder.mix(patches)
        scene = F.mse_loss(self.heads.from_vision(tokens), batch.positions)
        return encoder.finish(tokens), scene, *self.heads.where(encoder.landmarks, patches, tokens, batch.pixels)

    def _visual(self, policy: ReferencePolicy, tokens: Tensor) -> Tensor:
        """Return (B, M or M / 4, hidden): the language model's visual inputs in this stage."""
        if self.stage == "pooled":
            return policy.projector(pool_grid(tokens)) + pool_grid(policy.visual_position[None])
        return policy.projector(tokens) + policy.visual_position

    def run(self) -> None:
        """Train until the budget is used."""
        if self.stage == "pooled" and self.step == 0:
            self._measure_centre()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        last = saved = time.time()
        shown: dict[str, list[float]] = {}
        while (done := self._set_rate()) < 1.0:
            batch = self.data.batch(self.data.sample(self.args.batch), self.args.suffixes)
            loss, numbers = self.loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            self._update_average()
            self.step += 1
            if self.partner is not None and self.step % 8 == 0:
                self.partner.exchange(parameters)
            now = time.time()
            self.elapsed, last = self.elapsed + now - last, now
            for key, value in numbers.items():
                shown.setdefault(key, []).append(value)
            if self.step % 50 == 0:
                text = " ".join(f"{key} {np.mean(values):.3f}" for key, values in shown.items())
                speed = self.args.batch * 50 / (now - self._mark) if hasattr(self, "_mark") else 0
                self._mark, shown = now, {}
                print(f"{self.stage} {self.step} {100 * done:.0f}% {text} {speed:.0f} frames/s", flush=True)
            if now - saved > _SECONDS_BETWEEN_SAVES and self.args.worker == 0:
                saved = now
                self.save()
                if self.step > 100:
                    print("held out:", self.check(), flush=True)
        if self.args.worker > 0:
            return
        self.save(final=True)
        print("held out:", self.check(), flush=True)

    def _update_average(self) -> None:
        decay = min(0.998, 1 - 1 / (self.step + 1))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.policy.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)

    @torch.no_grad()
    def _measure_centre(self) -> None:
        """Fix the values that `VisionEncoder` subtracts: the mean token of each place and the spread of each
        channel.
        """
        for policy in (self.policy, self.average):
            encoder = policy.vision
            rows = np.random.default_rng(0).choice(self.data.train_rows, 1024)
            tokens = torch.cat(
                [encoder.mix(encoder.patches(policy.pixels(self.data.images(part)))) for part in np.split(rows, 16)]
            )
            encoder.centre.copy_(tokens.mean(0))
            encoder.spread.copy_((tokens - encoder.centre).pow(2).mean((0, 1)).sqrt().clamp_min(1e-3))

    @torch.no_grad()
    def check(self, count: int = 400) -> dict[str, str]:
        """Held-out figures a task: position error in cm, or the averaged weights' mean absolute error of the action."""
        result = {}
        rng = np.random.default_rng(0)
        layout = suffix_layout(self.config, 1, self.stage == "pooled")
        policy = self.policy if self.stage == "vision" else self.average
        for number, task in enumerate(TASKS):
            rows = self.data.test_rows[self.data.frames.tasks[self.data.test_rows] == number]
            if not len(rows):
                continue
            batch = self.data.batch(rng.permutation(rows)[: count // len(TASKS)], 1)
            tokens, scene, _, found = self._see(policy, batch)
            result[task] = f"{10 * scene.item() ** 0.5:.1f} cm, {found.item():.2f}"
            if self.stage == "vision":
                continue
            bins = to_bins(batch.actions, self.config.num_bins)
            visual = self._visual(policy, tokens)
            logits, _ = packed_forward(policy, visual, batch.text, batch.proprio, bins, layout)
            error = (policy.bin_values[logits.argmax(-1)] - batch.actions).abs().mean()
            result[task] = f"{error:.3f}"
        return result

    def save(self, final: bool = False) -> None:
        """Write the checkpoint, for going on, and the policy, for use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "stage": self.stage,
            "policy": self.policy.state_dict(),
            "average": self.average.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "elapsed": 1e9 if final else self.elapsed,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)
        if self.stage != "vision":
            # Until the rate has come down the moving average acts better; in the end it lags behind the newest weights.
            save_policy(self.policy if final else self.average, self.folder / self.path.stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--start", help="checkpoint to start from (a name in --out)")
    parser.add_argument("--name", help="checkpoint to write; the stage's name if left out")
    parser.add_argument("--data", nargs="*", type=Path, default=[DATA_ROOT / "demonstrations", DATA_ROOT / "dagger"])
    parser.add_argument("--out", type=Path, default=DATA_ROOT / "checkpoints")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--suffixes", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--encoder-rate", type=float, default=0.5, help="of --rate, after the vision stage; 0 freezes it"
    )
    parser.add_argument("--state-weight", type=float, default=0.3)
    parser.add_argument("--find-weight", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pair", action="store_true", help="train with a second process, started with --worker 1")
    parser.add_argument("--worker", type=int, choices=(0, 1), default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Trainer(args).run()


if __name__ == "__main__":
    main()
