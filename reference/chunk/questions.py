"""Questions about one recorded control step and their answers: the simulator's labels, and imagined hands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reference.chunk import libero_things
from reference.chunk.corpus import Corpus
from reference.chunk.metaworld_record import CHUNK_EXPERTS
from reference.dataset import SHARED_SCENE, moved_hands
from reference.experts import HAND, OBJECT
from vla_pruner.models.chunk import ChunkConfig
from vla_pruner.models.reference.tokenizer import encode
from vla_pruner.simulators.metaworld import TASKS

FRESH_SHARE = 2.0
"""The weight of control steps that were recorded while the policy acted, in drawing."""
SHARES = {"push": 1.5, "pick-place": 2.0, "coffee-push": 1.5, "plate-slide": 5.0}
"""The weight of a task's steps in drawing, 1 if not named."""
LIBERO_SHARES = {libero_things.instruction("salad_dressing").replace(" ", "_"): 3.0}
"""The same of LIBERO-Object's tasks."""

RECORDED_WEIGHT = 4.0
"""The weight of the recorded question in the loss. It alone says what to do in contact: with a weight of 1 among seven
imagined hands, the policy slid the plate straight on where its goal was to the side.
"""

_NAMES = list(TASKS)
_SHARED = np.array([_NAMES.index(task) for task in SHARED_SCENE])
_CONTACT = 0.06  # metres: nearer than this the object may move, and only the simulator can compute how
_FOLLOWS, _LEADS = 0.3, 0.1
"""The share of its distance to the target that the hand covers in one action, and the share of the newest command (0.01
m at full deflection); read off a few recorded movements.
"""


@dataclass
class Batch:
    """B control steps with S questions each."""

    rows: np.ndarray
    text: Tensor
    """(B, S, T) int64."""
    proprio: Tensor
    """(B, S, P) float32."""
    chunks: Tensor
    """(B, S, T, A) float32."""
    weight: Tensor
    """(B, S, T) float32, zero if the answer is not known."""
    imagined: Tensor
    """(B, S) bool: the hand is not where the images show it, so the wrist camera must not be read."""
    marks: Tensor
    """(B, C, K, 2) float32 pixels, NaN where a thing is out of view."""
    asked: Tensor
    """(B, S, J) int64: the things that each question is about, whose places the decoder is asked for."""


class Questions:
    """Rows split by episode into training and held-out ones, and a sampler of batches."""

    shares: Mapping[str, float] = {}
    """The weight of a task's steps in drawing, 1 if not named."""

    def __init__(self, corpus: Corpus, config: ChunkConfig, seed: int) -> None:
        self.corpus, self.config = corpus, config
        self.rng = np.random.default_rng(seed)
        held_out = corpus.episodes % 25 == 7
        self.train_rows, self.test_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        length = config.instruction_length
        self.ids = np.array([encode(text, config.words, length) for _, text in config.tasks])
        tasks = corpus.tasks[self.train_rows]
        shares = np.array([self.shares.get(task, 1.0) for task, _ in config.tasks])
        # A task's share does not depend on how long its episodes are.
        weights = (shares / np.bincount(tasks, minlength=len(shares)).clip(1))[tasks]
        weights *= np.where(corpus.fresh[self.train_rows], FRESH_SHARE, 1.0)
        self.weights = weights / weights.sum()

    @classmethod
    def asked(cls, config: ChunkConfig) -> int:
        """The number of things that one question is about."""
        return config.landmarks

    def sample(self, size: int) -> np.ndarray:
        """(size,) training rows."""
        return self.rng.choice(self.train_rows, size, p=self.weights)

    def batch(self, rows: np.ndarray, suffixes: int) -> Batch:
        """B = len(rows) control steps with S = `suffixes` questions each; the first is the recorded one."""
        raise NotImplementedError

    def batch_of(
        self,
        rows: np.ndarray,
        questions: np.ndarray,
        proprio: np.ndarray,
        chunks: np.ndarray,
        weight: np.ndarray,
        imagined: np.ndarray,
        asked: np.ndarray,
    ) -> Batch:
        """A batch of arrays; `questions` (B, S) are numbers of tasks, the others as in `Batch`."""
        arrays = (self.ids[questions], proprio, chunks, weight, imagined, self.corpus.marks[rows], asked)
        return Batch(rows, *map(torch.from_numpy, arrays))

    def images(self, rows: np.ndarray) -> Tensor:
        """(N, C, H, W, 3) uint8."""
        return torch.from_numpy(self.corpus.images(rows))


class MetaWorldQuestions(Questions):
    """After the recorded question come other tasks of the scene, as the simulator answers them, then moved hands."""

    shares = SHARES

    def batch(self, rows: np.ndarray, suffixes: int) -> Batch:
        corpus, config = self.corpus, self.config
        count, steps = len(rows), config.chunk
        chunks = np.zeros((count, suffixes, steps, config.action_dimensions), np.float32)
        weight = np.ones((count, suffixes, steps), np.float32)
        questions = np.repeat(corpus.tasks[rows][:, None], suffixes, axis=1).astype(np.int64)
        proprio = np.repeat(corpus.proprio[rows][:, None], suffixes, axis=1)
        imagined = np.zeros((count, suffixes), bool)
        known = corpus.questions[rows]
        own = (known == corpus.tasks[rows][:, None]).argmax(1)
        pick = np.arange(count)
        chunks[:, 0] = corpus.chunks[rows][pick, own]
        if suffixes > 1:
            several = known[:, -1] >= 0
            others = (own + self.rng.integers(1, known.shape[1], count)) % known.shape[1]
            others = np.where(several, others, own)
            chunks[:, 1], questions[:, 1] = corpus.chunks[rows][pick, others], known[pick, others]
            # If a scene has one task, the second question is a moved hand like the rest.
            first = np.where(several, 2, 1)
            place = np.arange(suffixes)[None] >= first[:, None]
            where, which = np.nonzero(place)
            states = corpus.states[rows][where].astype(np.float64)
            tasks = questions[where, which]
            shared = np.isin(tasks, _SHARED)
            tasks[shared] = self.rng.choice(_SHARED, int(shared.sum()))
            states = moved_hands(self.rng, tasks, states)
            answer, trusted = imagined_chunks(tasks, states, steps)
            chunks[where, which], weight[where, which] = answer, trusted
            questions[where, which], proprio[where, which] = tasks, states[:, :4]
            imagined[where, which] = True
            weight[:, 0] = RECORDED_WEIGHT
        asked = np.broadcast_to(np.arange(config.landmarks), (count, suffixes, config.landmarks)).copy()
        return self.batch_of(rows, questions, proprio, chunks, weight, imagined, asked)


class LiberoQuestions(Questions):
    """Every question and answer is recorded: other objects of the scene, then moved hands (`libero_record.answers`)."""

    shares = LIBERO_SHARES

    def __init__(self, corpus: Corpus, config: ChunkConfig, seed: int) -> None:
        super().__init__(corpus, config, seed)
        things = [thing for thing in libero_things.THINGS if thing in libero_things.TASKS]
        self.tasks = np.array([libero_things.TASKS.index(thing) for thing in things])
        """The task about each thing, by the number that recordings give it."""

    @classmethod
    def asked(cls, config: ChunkConfig) -> int:
        return 2  # the object and the basket

    def batch(self, rows: np.ndarray, suffixes: int) -> Batch:
        corpus, size = self.corpus, len(self.config.proprio_mean)
        recorded = corpus.questions.shape[1]
        # The recorded question stays in front; the others are drawn.
        picked = np.zeros((len(rows), min(suffixes, recorded)), np.int64)
        for row in picked:
            row[1:] = 1 + self.rng.permutation(recorded - 1)[: len(row) - 1]
        at = np.arange(len(rows))[:, None]
        things = corpus.questions[rows][at, picked]
        asked = things >= 0
        questions = self.tasks[np.where(asked, things, things[:, :1])]
        states = corpus.states[rows]
        proprio = states[:, : recorded * size].reshape(len(rows), recorded, size)[at, picked]
        imagined = states[:, recorded * size :][at, picked] > 0.5
        chunks = corpus.chunks[rows][at, picked]
        weight = np.repeat(asked[:, :, None].astype(np.float32), self.config.chunk, axis=2)
        basket = libero_things.THINGS.index("basket")
        target = np.where(asked, things, things[:, :1]).astype(np.int64)
        about = np.stack([target, np.full_like(target, basket)], axis=-1)
        return self.batch_of(rows, questions, proprio, chunks, weight, imagined, about)


def imagined_chunks(tasks: np.ndarray, states: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The experts' next actions while only the hand moves, by a simple model of how it follows.

    Args:
        tasks: (N,) numbers. states: (N, 39).
        steps: actions T.

    Returns:
        (N, T, 4) actions and (N, T) how far to trust them: not once the hand touches something that can be moved.
    """
    states = states.copy()
    actions, trusted = np.zeros((len(states), steps, 4), np.float32), np.ones((len(states), steps), np.float32)
    lead = np.zeros((len(states), 3))
    touched = np.zeros(len(states), bool)
    for step in range(steps):
        action = np.zeros((len(states), 4), np.float32)
        for task in np.unique(tasks):
            mine = tasks == task
            action[mine] = CHUNK_EXPERTS[_NAMES[task]](states[mine])
        if step == 0:
            lead = 0.7 * 0.01 * action[:, :3] / _FOLLOWS  # mostly, a hand is already on its way
        actions[:, step], trusted[:, step] = action, ~touched
        moved = _FOLLOWS * lead + _LEADS * 0.01 * action[:, :3]
        lead += 0.01 * action[:, :3] - moved
        states[:, HAND] += moved
        touched |= np.linalg.norm(states[:, HAND] - states[:, OBJECT], axis=1) < _CONTACT
    return actions, trusted
