"""Recordings: traces and LeRobot's layouts, the choice of episodes, and refusals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.calibration.fakes import LENGTHS, SENTENCES, Drawn, dataset, grey, made_up_folder, made_up_trace
from vla_pruner.calibration import CalibrationError, calibrate, find_recordings
from vla_pruner.calibration.replay import replay
from vla_pruner.evaluation import EvaluationError
from vla_pruner.evaluation.arms import method_arms
from vla_pruner.evaluation.traces import trace_path, write_trace
from vla_pruner.wording import install


def camera_policy(*cameras: str, state: int | None = 4) -> Any:
    policy: Any = Drawn()
    policy.cameras, policy.proprio_size = cameras, state
    return policy


def test_traces_of_other_arms_are_left_alone_and_tasks_take_turns(tmp_path: Path) -> None:
    made_up_folder(tmp_path, states=3)
    write_trace(tmp_path, made_up_trace(0, arm="fastv-0.5-drop-K3"))
    found = find_recordings(tmp_path, Drawn(), episodes=3)
    units = [load().unit for load in found.loaders]
    assert [(unit.task, unit.initial_state) for unit in units] == [("reach", 0), ("push", 0), ("reach", 1)]
    found = find_recordings(tmp_path, Drawn(), tasks=("push",), max_steps=2, every=2)
    recordings = [load() for load in found.loaders]
    assert [one.unit.task for one in recordings] == ["push"] * 3
    assert recordings[0].steps.tolist() == [0, 2]
    made = made_up_trace(0, 1)
    assert np.array_equal(recordings[0].images["image"], made.images["image"][[0, 2]])
    assert np.array_equal(recordings[0].observation(1).proprio, made.observation(2).proprio)  # type: ignore[arg-type]
    assert len(recordings[0].actions) == 10, "the scale is that of all that was recorded"


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("video", [False, True], ids=["images", "videos"])
def test_lerobots_layouts_are_read(tmp_path: Path, version: str, video: bool) -> None:
    pytest.importorskip("pyarrow")
    if video:
        pytest.importorskip("av")
    folder = dataset(tmp_path / "d", version, video)
    found = find_recordings(folder, Drawn(), every=2)
    assert (len(found), found.kind, found.weights) == (3, "dataset", None)
    for episode, load in enumerate(found.loaders):
        one = load()
        steps = list(range(0, LENGTHS[episode], 2))
        assert one.steps.tolist() == steps
        assert one.instructions == (SENTENCES[episode % 2],) * len(steps)
        assert one.images["image"].shape == (len(steps), 32, 32, 3)
        shown = one.images["image"].astype(float).mean(axis=(1, 2, 3))
        assert shown == pytest.approx([grey(episode, step) for step in steps], abs=3.0 if video else 0.0)
        assert one.actions.shape == (LENGTHS[episode], 4)
        wanted = np.random.default_rng([episode, steps[-1]]).normal(size=4).astype(np.float32)
        assert one.proprio is not None
        assert np.array_equal(one.proprio[-1], wanted)
        assert one.unit.initial_state == episode
    assert replay(Drawn(), [], found).against_recorded is None


def test_episodes_are_spread_over_a_dataset(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = dataset(tmp_path / "d", "v3.0", False)
    assert [load().unit.initial_state for load in find_recordings(folder, Drawn(), episodes=2).loaders] == [0, 2]
    found = find_recordings(folder, Drawn(), tasks=(SENTENCES[1],))
    assert [load().name for load in found.loaders] == ["episode 1"]


def test_cameras_are_matched_by_name_or_as_the_user_says(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = dataset(tmp_path / "d", "v2.1", False, camera="top")
    assert set(find_recordings(folder, camera_policy("image")).loaders[0]().images) == {"image"}, "there is but one"
    with pytest.raises(CalibrationError, match=r"cameras 'left', 'right', and .* has 'top'; say .* --camera"):
        find_recordings(folder, camera_policy("left", "right"))
    with pytest.raises(
        CalibrationError, match=r"--camera says nothing of the policy's camera 'left', and .* has 'top'"
    ):
        find_recordings(folder, camera_policy("left", "right"), cameras={"right": "top"})
    found = find_recordings(folder, camera_policy("top", "right"), cameras={"right": "top"})
    assert tuple(found.loaders[0]().images) == ("top", "right"), "who is not named is matched by name"
    with pytest.raises(CalibrationError, match="--camera is right=front"):
        find_recordings(folder, camera_policy("left", "right"), cameras={"right": "front"})


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"There is no folder .*nowhere; --from is"):
        find_recordings(tmp_path / "nowhere", Drawn())
    with pytest.raises(CalibrationError, match="holds no traces of the unpruned policy and no LeRobot dataset"):
        find_recordings(tmp_path, Drawn())
    write_trace(tmp_path, made_up_trace(0, arm="blank-image"))
    with pytest.raises(CalibrationError, match="holds no traces of the unpruned policy"):
        find_recordings(tmp_path, Drawn())
    made_up_folder(tmp_path)
    with pytest.raises(CalibrationError, match="has no task 'fly'; it has 'push', 'reach'"):
        find_recordings(tmp_path, Drawn(), tasks=("fly",))
    with pytest.raises(
        CalibrationError, match="recorded with the cameras 'image', and this policy has 'left', 'right'"
    ):
        replay(camera_policy("left", "right"), [], find_recordings(tmp_path, camera_policy("left", "right")))
    with pytest.raises(CalibrationError, match="has 4 numbers, and this policy takes 9 numbers"):
        replay(camera_policy("image", state=9), [], find_recordings(tmp_path, camera_policy("image", state=9)))
    with pytest.raises(CalibrationError, match="--camera is for datasets"):
        find_recordings(tmp_path, Drawn(), cameras={"a": "b"})
    path = trace_path(tmp_path, made_up_trace(0).unit, "unpruned")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(EvaluationError, match="is damaged"):
        find_recordings(tmp_path, Drawn())


def test_an_instruction_that_the_policy_does_not_know_is_named(tmp_path: Path) -> None:
    from tests.evaluation.fakes import tiny_policy

    write_trace(tmp_path, made_up_trace(0, size=32, instructions=("juggle",) * 5))
    with pytest.raises(
        CalibrationError, match=r"What was recorded .* does not fit this policy: The instruction 'juggle'"
    ):
        calibrate(tiny_policy(), [], find_recordings(tmp_path, tiny_policy()))


def test_damaged_datasets_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    folder = dataset(tmp_path / "d", "v3.0", True)
    policy = Drawn()
    assert (folder / "videos").is_dir()
    video = next(folder.glob("videos/**/*.mp4"))
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        CalibrationError, match=r"file-000.mp4 of the LeRobot dataset .* cannot be read \(it holds no video\)"
    ):
        replay(policy, [], find_recordings(folder, policy))
    video.unlink()
    with pytest.raises(CalibrationError, match=r"There is no video .*file-000.mp4, which episode 0 names"):
        replay(policy, [], find_recordings(folder, policy))
    table = next(folder.glob("data/**/*.parquet"))
    table.write_bytes(b"nonsense")
    with pytest.raises(CalibrationError, match=r"file-000.parquet of the LeRobot dataset .* cannot be read"):
        replay(policy, [], find_recordings(folder, policy))
    (folder / "meta/tasks.parquet").unlink()
    with pytest.raises(CalibrationError, match=r"meta/tasks.parquet of the LeRobot dataset"):
        find_recordings(folder, policy)
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v9.0"}))
    with pytest.raises(CalibrationError, match=r"of the layout 'v9.0'; v2.0, v2.1, v3.0 are read"):
        find_recordings(folder, policy)
    (folder / "meta/info.json").write_text("{")
    with pytest.raises(CalibrationError, match=r"meta/info.json of the LeRobot dataset"):
        find_recordings(folder, policy)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(CalibrationError, match=r"needs pyarrow, .* run: " + re.escape(install("dataset"))):
        find_recordings(dataset_without_reading(tmp_path / "e", info), policy)


def dataset_without_reading(folder: Path, info: Any) -> Path:
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


def test_a_frame_that_is_missing_is_no_other_frame(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    folder = dataset(tmp_path / "d", "v2.1", True)
    short, long = (folder / f"videos/chunk-000/observation.images.image/episode_{n:06d}.mp4" for n in (0, 1))
    long.write_bytes(short.read_bytes())
    with pytest.raises(CalibrationError, match=r"episode_000001.mp4 has no frame at 0\.400 s"):
        replay(Drawn(), [], find_recordings(folder, Drawn()))


def test_a_gate_is_refused_on_a_dataset(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from tests.evaluation.fakes import tiny_policy

    folder = dataset(tmp_path / "d", "v2.1", False)
    arms = method_arms(("text-query:gate=3",), (0.5,), (1,), ("drop",))
    with pytest.raises(CalibrationError, match="reads how far the arm moves, which a dataset's actions do not say"):
        replay(tiny_policy(), arms, find_recordings(folder, tiny_policy()))
