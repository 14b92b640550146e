"""Trains a two-camera policy in three stages on the CPU; each is resumable and ends after a budget of minutes.

`python -m reference.chunk.train vision --minutes 10`: the image encoder learns to find things.
`python -m reference.chunk.train pooled --minutes 30`: everything, on 2 x 2-pooled visual tokens: shorter sequences.
`python -m reference.chunk.train full --minutes 60`: everything, on all visual tokens.

A stage starts from the checkpoint of `--start` (default: the stage before) unless its own checkpoint exists and is
unfinished; the learning rate follows the share of the budget that was used. Matrices are multiplied in bfloat16.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from reference.chunk import libero_things
from reference.chunk.attention import attend, decoder_attention
from reference.chunk.corpus import DATA_ROOT, Corpus
from reference.chunk.heads import TrainingHeads
from reference.chunk.packing import mask, packed_forward, pool, positions
from reference.chunk.questions import Batch, LiberoQuestions, MetaWorldQuestions
from reference.train import Partner
from vla_pruner.models.chunk import ChunkConfig, ChunkPolicy, load_chunk_policy, save_chunk_policy
from vla_pruner.models.reference.tokenizer import vocabulary
from vla_pruner.simulators.metaworld import TASKS

STAGES = ("vision", "pooled", "full")
_SECONDS_BETWEEN_SAVES = 90

_LIBERO_INSTRUCTIONS = tuple(map(libero_things.instruction, libero_things.TASKS))
CONFIGS = {
    "metaworld": ChunkConfig(
        hidden_size=192,
        num_layers=10,
        intermediate_size=512,
        words=vocabulary(TASKS.values()),
        tasks=tuple(TASKS.items()),
    ),
    "libero-object": ChunkConfig(
        suite="libero_object",
        landmarks=len(libero_things.THINGS),
        hidden_size=192,
        num_layers=10,
        intermediate_size=512,
        instruction_length=11,
        proprio_mean=(-0.05, 0.0, 0.17, 3.1, 0.0, -0.05, 0.035, -0.035),
        proprio_scale=(0.1, 0.15, 0.08, 0.2, 0.3, 0.1, 0.01, 0.01),
        action_dimensions=7,
        words=vocabulary(_LIBERO_INSTRUCTIONS),
        tasks=tuple((text.replace(" ", "_"), text) for text in _LIBERO_INSTRUCTIONS),
    ),
}
QUESTIONS = {"metaworld": MetaWorldQuestions, "libero-object": LiberoQuestions}


class Trainer:
    """One stage of training: its model, its data and its loop."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed + args.worker)
        self.args, self.stage = args, str(args.stage)
        self.config = CONFIGS[args.suite]
        questions = QUESTIONS[args.suite]
        self.policy, self.heads = ChunkPolicy(self.config), TrainingHeads(self.config, questions.asked(self.config))
        AttentionInterface.register("training", decoder_attention)
        self.policy.decoder.config._attn_implementation = "training"
        blocks: list[Any] = list(self.policy.vision.blocks)
        for block in blocks:
            block.attend = attend
        landmarks: list[Any] = list(self.policy.vision.landmarks)
        for marks in landmarks:
            torch.nn.init.constant_(marks.cells.bias, -4.0)
        self.folder: Path = args.out / args.suite
        self.path = self.folder / f"{args.name or self.stage}.pt"
        self.elapsed, self.step = 0.0, 0
        self.encoder_factor = 1.0 if self.stage == "vision" else args.encoder_rate
        saved = self._load()
        self.optimizer = self._optimizer()
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        corpus = Corpus(args.data or [DATA_ROOT / args.suite, DATA_ROOT / f"{args.suite}-dagger"])
        print(f"{len(corpus)} control steps, {int(corpus.fresh.sum())} of them from DAgger", flush=True)
        self.data = questions(corpus, self.config, args.seed + self.step + 1_000_000 * args.worker)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.partner = Partner(self.path.with_suffix(".shared"), args.worker) if args.pair else None
        self.side = self.config.image_size // self.config.patch_size

    @property
    def pooled(self) -> bool:
        return self.stage == "pooled"

    def _load(self) -> dict | None:
        """Continue this stage if it is unfinished, else start from the stage before."""
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            if saved["stage"] == self.stage and saved["elapsed"] < 60 * self.args.minutes:
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
        if (Path(start) / "model.safetensors").is_file():
            trained = load_chunk_policy(start)
            given, own = trained.state_dict(), self.policy.state_dict()
            fits = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
            if trained.config.suite != self.config.suite:
                # Another suite's words and average scene have the same shapes and mean something else.
                for name in ("decoder.embed_tokens.weight", "vision.centre", "vision.spread"):
                    fits.pop(name, None)
            self.policy.load_state_dict(fits, strict=False)
            print(f"starting from the policy in {start}, with new training heads; new: {sorted(own.keys() - fits)}")
            return None
        saved = torch.load(self.folder / f"{start}.pt", weights_only=True)
        self.policy.load_state_dict(saved["policy"])
        own = self.heads.state_dict()
        fits = {name: value for name, value in saved["heads"].items() if own[name].shape == value.shape}
        self.heads.load_state_dict(fits, strict=False)
        new = f", with new heads {sorted(own.keys() - fits)}" if own.keys() - fits else ""
        print(f"starting from {start}.pt{new}")
        return None

    def _optimizer(self) -> torch.optim.Optimizer:
        encoder = list(self.policy.vision.parameters())
        rest = [p for name, p in self.policy.named_parameters() if not name.startswith("vision.")]
        groups = [
            {"params": rest + list(self.heads.parameters()), "factor": 1.0},
            {"params": encoder, "factor": self.encoder_factor},
        ]
        return torch.optim.AdamW(groups, lr=self.args.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def _set_rate(self) -> float:
        done = min(1.0, self.elapsed / (60 * self.args.minutes))
        scale = min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.rate * scale * group["factor"]
        return done

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return the stage's loss and the figures to print."""
        encoder = self.policy.vision
        with torch.autocast("cpu", torch.bfloat16):
            patches = encoder.patches(self.policy.pixels(self.data.images(batch.rows)))
            tokens = encoder.mix(patches)
            finding, found = self.heads.where(encoder, patches, tokens, batch.marks)
            numbers = {"find": finding.item(), "found": found.item()}
            if self.stage == "vision":
                return finding, numbers
            tokens = encoder.finish(tokens)
            if self.pooled:
                places = pool(self.policy.visual_position, self.side)
                visual = (self.policy.projector(pool(tokens, self.side)) + places).flatten(1, 2)
            else:
                visual = self.policy.project(tokens)
            sees = mask(self.config, batch.imagined, self.pooled)
            where = positions(self.config, batch.text.shape[1], self.pooled)
            chunks, hidden = packed_forward(self.policy, visual, batch.text, batch.proprio, sees, where)
            placing = self.heads.placing(hidden, batch.marks, batch.asked, batch.imagined)
        error = (chunks - batch.chunks).abs().mean(-1)
        acting = (error * batch.weight).sum() / batch.weight.sum()
        numbers |= {
            "l1": acting.item(),
            "own": error[:, 0].mean().item(),
            "first": error[:, 0, :4].mean().item(),
            "place": placing.item(),
        }
        return acting + self.args.place_weight * placing + self.args.find_weight * finding, numbers

    def run(self) -> None:
        """Train until the budget is used."""
        if self.pooled and self.step == 0 and self.args.start is None:
            self._measure_centre()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        last = saved = marked = time.time()
        shown: dict[str, list[float]] = {}
        while (done := self._set_rate()) < 1.0:
            suffixes = 1 if self.stage == "vision" else self.args.suffixes
            batch = self.data.batch(self.data.sample(self.args.batch), suffixes)
            loss, numbers = self.loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            if self.partner is not None and self.step % 8 == 0:
                self.partner.exchange(parameters)
            now = time.time()
            self.elapsed, last = self.elapsed + now - last, now
            for key, value in numbers.items():
                shown.setdefault(key, []).append(value)
            if self.step % 50 == 0:
                text = " ".join(f"{key} {np.mean(values):.4f}" for key, values in shown.items())
                speed = self.args.batch * 50 / (now - marked)
                marked, shown = now, {}
                print(f"{self.stage} {self.step} {100 * done:.0f}% {text} {speed:.1f} steps/s", flush=True)
            if now - saved > _SECONDS_BETWEEN_SAVES and self.args.worker == 0:
                saved = now
                self.save()
                print("held out:", self.check(), flush=True)
        if self.args.worker > 0:
            return
        self.save(final=True)
        print("held out:", self.check(), flush=True)

    @torch.no_grad()
    def _measure_centre(self) -> None:
        """Fix the values that `CameraEncoder` subtracts: the mean token of each place and the spread of each
        channel.
        """
        encoder = self.policy.vision
        rows = np.random.default_rng(0).choice(self.data.train_rows, 1024)
        with torch.autocast("cpu", torch.bfloat16):
            parts = [
                encoder.mix(encoder.patches(self.policy.pixels(self.data.images(part)))).float()
                for part in np.split(rows, 32)
            ]
        tokens = torch.cat(parts)
        encoder.centre.copy_(tokens.mean(0))
        spread = (tokens - encoder.centre).pow(2).mean((0, 2)).sqrt()
        encoder.spread.copy_(spread[:, None].clamp_min(1e-3))

    @torch.no_grad()
    def check(self, count: int = 256) -> dict[str, str]:
        """Return held-out figures of each task: the things found, and the mean absolute error of the first four
        actions.
        """
        result = {}
        rng = np.random.default_rng(0)
        for number, (task, _) in enumerate(self.config.tasks):
            rows = self.data.test_rows[self.data.corpus.tasks[self.data.test_rows] == number]
            if len(rows):
                _, numbers = self.loss(self.data.batch(rng.permutation(rows)[: count // len(self.config.tasks)], 1))
                result[task] = f"{numbers.get('first', numbers['found']):.3f}"
        return result

    def save(self, final: bool = False) -> None:
        """Write the checkpoint, for going on, and the policy, for use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "stage": self.stage,
            "policy": self.policy.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "elapsed": 1e9 if final else self.elapsed,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)
        if self.stage != "vision":
            save_chunk_policy(self.policy, self.folder / self.path.stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--suite", choices=tuple(CONFIGS), default="metaworld")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--start", help="checkpoint to start from: a name in --out, or the folder of a saved policy")
    parser.add_argument("--name", help="checkpoint to write; the stage's name if left out")
    parser.add_argument("--data", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=DATA_ROOT / "checkpoints")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--suffixes", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--encoder-rate", type=float, default=0.5, help="of --rate, after the vision stage")
    parser.add_argument("--place-weight", type=float, default=1.0)
    parser.add_argument("--find-weight", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pair", action="store_true", help="train with a second process, started with --worker 1")
    parser.add_argument("--worker", type=int, choices=(0, 1), default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Trainer(args).run()


if __name__ == "__main__":
    main()
