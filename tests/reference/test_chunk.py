"""The two-camera policy's training: packed questions, labels, recordings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from reference.chunk.attention import attend, decoder_attention
from reference.chunk.corpus import Corpus, Recorder
from reference.chunk.evaluate import entry_of, joined, main, wrong_scene
from reference.chunk.heads import TrainingHeads
from reference.chunk.packing import mask, packed_forward, pool, positions
from reference.chunk.questions import MetaWorldQuestions, imagined_chunks
from reference.chunk.train import CONFIGS
from vla_pruner.models.chunk import ChunkConfig, ChunkPolicy
from vla_pruner.models.chunk.loading import SHIPPED_WEIGHTS, load_chunk_policy
from vla_pruner.policies.random import draw_weights

CONFIG = ChunkConfig(
    image_size=32,
    vision_width=32,
    vision_layers=1,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=32,
    words=("open", "the"),
    tasks=(("a", "open the"), ("b", "open")),
)


@pytest.fixture(scope="module")
def policy() -> ChunkPolicy:
    torch.manual_seed(0)
    made = ChunkPolicy(CONFIG).eval()
    draw_weights(made, 0)
    return made


def test_packed_questions_compute_what_each_computes_alone(policy: ChunkPolicy) -> None:
    AttentionInterface.register("training", decoder_attention)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (2, 2, 32, 32, 3), dtype=torch.uint8, generator=draw)
    text = torch.randint(0, CONFIG.vocabulary_size, (2, 3, CONFIG.instruction_length), generator=draw)
    proprio = torch.randn(2, 3, 4, generator=draw)
    with torch.no_grad():
        alone = [policy.decode(policy.embed_prompt(images, text[:, s], proprio[:, s])) for s in range(3)]
        visual = policy.project(policy.vision(policy.pixels(images)))
        policy.decoder.config._attn_implementation = "training"
        try:
            imagined = torch.tensor([[False, False, True], [False, True, False]])
            sees, places = mask(CONFIG, imagined, pooled=False), positions(CONFIG, 3, pooled=False)
            packed, _ = packed_forward(policy, visual, text, proprio, sees, places)
        finally:
            policy.decoder.config._attn_implementation = "sdpa"
    for row in range(2):
        for question in range(3):
            same = torch.allclose(packed[row, question], alone[question][row], atol=1e-4)
            # A question whose hand is imagined does not see the second camera, so its answer is another.
            assert same != bool(imagined[row, question])


def test_attention_for_training_has_the_gradients_of_torchs_own() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, 5, 4, generator=draw, requires_grad=True) for _ in range(3)]
    other = [part.detach().clone().requires_grad_() for part in parts]
    weight = torch.randn(2, 3, 5, 4, generator=draw)
    (attend(*parts) * weight).sum().backward()
    (torch.nn.functional.scaled_dot_product_attention(*other) * weight).sum().backward()
    for mine, theirs in zip(parts, other, strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)  # type: ignore[arg-type]


def test_pooled_tokens_are_means_of_blocks() -> None:
    grid = torch.arange(16.0).view(1, 16, 1)
    assert pool(grid, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_a_thing_out_of_view_is_asked_of_no_patch(policy: ChunkPolicy) -> None:
    heads = TrainingHeads(CONFIG, 2)
    marks = torch.full((1, 2, 2, 2), float("nan"))
    marks[0, 0, 0] = torch.tensor([12.0, 20.0])
    patches = torch.randn(1, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, found = heads.where(policy.vision, patches, patches, marks)
    assert loss.isfinite()
    assert found.item() in (0.0, 1.0)  # one thing is in view


def test_the_decoder_is_asked_for_the_places_of_the_things_that_a_question_is_about() -> None:
    heads = TrainingHeads(CONFIG, 1)
    torch.nn.init.zeros_(heads.places.weight)
    torch.nn.init.zeros_(heads.places.bias)  # it always guesses the middle of the image
    side = CONFIG.image_size
    marks = torch.full((1, 2, 2, 2), side / 2)
    marks[0, 0, 1] = 0.75 * side
    marks[0, 1, 1] = 0.25 * side
    marks[0, 1, 0] = float("nan")
    hidden = torch.ones(1, 1, CONFIG.hidden_size)

    def distance(thing: int, imagined: bool) -> float:
        asked, moved = torch.tensor([[[thing]]]), torch.tensor([[imagined]])
        with torch.no_grad():
            return heads.placing(hidden, marks, asked, moved).item()

    assert distance(0, False) == 0.0  # out of the second camera's view
    assert distance(1, False) == 0.25
    marks[0, 1, 1] = side / 2
    assert distance(1, False) == 0.125
    assert distance(1, True) == 0.25  # the second camera shows another place of the hand


def _row(episode: int) -> dict[str, object]:
    chunks = np.full((3, 8, 4), episode, np.float32)
    state = np.linspace(0, 1, 39, dtype=np.float32)
    return {
        "images": np.full((2, 32, 32, 3), episode, np.uint8),
        "proprio": state[:4],
        "states": state,
        "chunks": chunks,
        "questions": np.array([0, -1, -1], np.int16),
        "marks": np.zeros((2, 2, 2), np.float32),
        "tasks": np.int16(0),
        "episodes": np.int64(episode),
    }


def test_recordings_come_back_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    for name, episodes in (("000000", (0, 1)), ("000020", (0,))):
        recorder = Recorder()
        for episode in episodes:
            recorder.add(**_row(episode))
        recorder.save(tmp_path / "first" / "a" / name)
    (tmp_path / "first" / "a" / "000040.partial").mkdir()
    corpus = Corpus([tmp_path / "first", tmp_path / "second"])
    assert corpus.episodes.tolist() == [0, 1, 2]
    assert corpus.images(np.array([1, 2, 0]))[:, 0, 0, 0, 0].tolist() == [1, 0, 0]
    assert not corpus.fresh.any()
    with pytest.raises(ValueError, match="record some first"):
        Corpus([tmp_path / "second"])


def test_only_moved_hands_are_imagined(tmp_path: Path) -> None:
    recorder = Recorder()
    for episode in range(4):
        recorder.add(**_row(episode))
    recorder.save(tmp_path / "first" / "a" / "000000")
    batch = MetaWorldQuestions(Corpus([tmp_path / "first"]), CONFIGS["metaworld"], 0).batch(np.arange(4), 3)
    assert batch.imagined.tolist() == [[False, True, True]] * 4
    assert batch.chunks[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(batch.proprio[:, 0], torch.from_numpy(np.stack([_row(0)["proprio"]] * 4)))  # type: ignore[arg-type]


def test_an_imagined_hand_goes_to_the_goal_and_is_not_trusted_once_it_touches() -> None:
    states = np.zeros((2, 39))
    states[:, 36:39] = [0.0, 0.8, 0.1]
    states[:, :3] = [0.0, 0.6, 0.1]
    states[:, 4:7] = [[1.0, 1.0, 1.0], [0.0, 0.63, 0.1]]
    actions, trusted = imagined_chunks(np.zeros(2, int), states, 8)
    assert (actions[:, :, 1] > 0).all()
    assert trusted[0].all()
    assert trusted[1, 0] == 1
    assert trusted[1, -1] == 0


def test_an_evaluation_grows_by_episodes() -> None:
    first = entry_of("reach", "policy", {"0": True, "1": False}, {"0": 10, "1": 40}, 50.0)
    more = entry_of("reach", "policy", {"2": True, "3": True}, {"2": 20, "3": 30}, 40.0)
    assert joined(None, more) == more
    both = joined(first, more)
    assert (both["successes"], both["episodes"], both["mean_control_steps"]) == (3, 4, 25.0)
    assert both["success_by_seed"] == {"0": True, "1": False, "2": True, "3": True}
    assert both["wilson_95"][0] < 0.75 < both["wilson_95"][1]


@pytest.mark.parametrize(
    ("suite", "seed", "generated", "wrong"),
    [("metaworld", 7, False, 57), ("libero_object", 7, True, 57), ("libero_object", 7, False, 32)],
)
def test_the_wrong_scene_is_another_of_the_same_kind(suite: str, seed: int, generated: bool, wrong: int) -> None:
    assert wrong_scene(suite, seed, generated) == wrong
    assert wrong_scene("libero_object", 40, False) == 15


def test_an_evaluation_refuses_what_cannot_run_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ["--weights", str(SHIPPED_WEIGHTS / "libero-object")]
    refused = {
        "--method is no-such-method": [*weights, "--arms", "policy", "no-such-method:keep=0.5"],
        "--method has the option 'kept=0.5'": [*weights, "--arms", "vla-pruner:kept=0.5"],
        "--tasks has b; this policy's tasks are": [*weights, "--tasks", "b"],
        "LIBERO stores 50": [*weights, "--episodes", "51"],
        "'0' is no number of 1 or more": [*weights, "--workers", "0"],
        str(tmp_path): ["--weights", str(tmp_path)],
    }
    for says, given in refused.items():
        monkeypatch.setattr("sys.argv", ["evaluate", "--suite", "libero_object", *given])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert says in " ".join(capsys.readouterr().err.split()), given


@pytest.mark.parametrize(
    ("held", "given", "says"),
    [
        ({}, ["--generated"], "figures with another generated"),
        ({}, ["--first-seed", "5"], "figures with another first_seed"),
        ({"weights_sha256": "0"}, [], "figures with another weights_sha256"),
        ({}, ["--episodes", "3"], "no control steps by seed, so nothing can be added"),
    ],
)
def test_an_evaluation_adds_only_to_figures_of_its_kind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    held: dict[str, str],
    given: list[str],
    says: str,
) -> None:
    weights = SHIPPED_WEIGHTS / "libero-object"
    task = next(name for name, _ in load_chunk_policy(weights).config.tasks)
    entry = entry_of(task, "policy", {"0": True, "1": True}, {"0": 10, "1": 10}, 50.0)
    del entry["control_steps_by_seed"]
    sha256 = hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()
    out = tmp_path / "figures.json"
    known = {"weights_sha256": sha256, "suite": "libero_object", "first_seed": 0, "results": [entry], **held}
    out.write_text(json.dumps(known))
    words = ["evaluate", "--suite", "libero_object", "--weights", str(weights), "--tasks", task, "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*words, "--first-seed", "0", *given])
    with pytest.raises(SystemExit):
        main()
    assert says in capsys.readouterr().err
    assert json.loads(out.read_text()) == known
