"""LeRobot datasets that were written by other tools, edited or damaged: the right frames, or one sentence with the
reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.calibration.fakes import LENGTHS, SENTENCES, Drawn, dataset, grey, made_up_trace
from vla_pruner.calibration import CalibrationError, find_recordings
from vla_pruner.calibration.replay import replay
from vla_pruner.evaluation.traces import write_trace

pytest.importorskip("pyarrow")
pytest.importorskip("av")

KEY = "observation.images.image"
Rows = list[dict[str, Any]]


def edit(path: Path, change: Callable[[Rows], Any]) -> None:
    """Change the rows of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)


def index_of(folder: Path) -> Path:
    return next(folder.glob("meta/episodes/*/*.parquet"))


def setting(name: str, values: list[Any]) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for row, value in zip(rows, values, strict=True):
            row[name] = value

    return change


def dropping(name: str) -> Callable[[Rows], None]:
    return lambda rows: [row.pop(name) for row in rows] and None


def shown(folder: Path, episode: int) -> list[float]:
    images = find_recordings(folder, Drawn()).loaders[episode]().images["image"]
    return images.astype(float).mean(axis=(1, 2, 3)).tolist()


def wanted(episode: int, steps: list[int] | None = None) -> Any:
    return pytest.approx([grey(episode, step) for step in steps or range(LENGTHS[episode])], abs=3.0)


def drifted(folder: Path, frames: float) -> Path:
    """A dataset of layout 3 whose episodes begin that much later each by their from_timestamp."""
    made = dataset(folder, "v3.0", True)
    starts = np.cumsum([0, *LENGTHS[:-1]]) / 10 + np.arange(3) * frames / 10
    edit(index_of(made), setting(f"videos/{KEY}/from_timestamp", starts.tolist()))
    return made


def test_a_start_that_drifted_by_less_than_half_a_frame_is_corrected(tmp_path: Path) -> None:
    folder = drifted(tmp_path / "d", 0.2)
    for episode in range(3):
        assert shown(folder, episode) == wanted(episode)


@pytest.mark.parametrize("frames", [0.35, 0.6, 1.0, -0.3, 2.0], ids=str)
def test_a_start_that_drifted_further_is_refused(tmp_path: Path, frames: float) -> None:
    folder = drifted(tmp_path / "d", frames)
    assert shown(folder, 0) == wanted(0)
    with pytest.raises(
        CalibrationError, match=r"By its from_timestamp in meta/episodes, episode 2 begins at .* other st"
    ):
        shown(folder, 2)


def test_a_drift_that_nothing_corrects_is_refused(tmp_path: Path) -> None:
    folder = drifted(tmp_path / "d", 0.2)
    edit(index_of(folder), dropping("length"))
    with pytest.raises(CalibrationError, match="the index has no lengths to correct it by"):
        shown(folder, 0)


def test_a_video_that_holds_more_than_the_index_is_read_by_its_times(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", "v3.0", True)
    edit(index_of(folder), lambda rows: rows.pop(0))  # episodes 1 and 2 begin as they say, after one unlisted
    assert shown(folder, 0) == wanted(1)
    assert shown(folder, 1) == wanted(2)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_timestamps_of_rows_name_their_frames(tmp_path: Path, version: str) -> None:
    def at(step: int, second: float, folder: Path) -> Path:
        def change(rows: Rows) -> None:
            for row in rows:
                if row["frame_index"] == step:
                    row["timestamp"] = second

        for path in folder.glob("data/*/*.parquet"):
            edit(path, change)
        return folder

    repeated = at(3, 0.2, dataset(tmp_path / "a", version, True))
    assert shown(repeated, 1) == wanted(1, [0, 1, 2, 2, 4, 5]), "as LeRobot reads it: the frame nearest to the time"
    back = at(3, 0.0, dataset(tmp_path / "b", version, True))
    assert shown(back, 1) == wanted(1, [0, 1, 2, 0, 4, 5])
    near = at(3, 0.33, dataset(tmp_path / "c", version, True))
    assert shown(near, 1) == wanted(1), "less than half a frame away is corrected"
    far = at(3, 0.36, dataset(tmp_path / "e", version, True))
    with pytest.raises(
        CalibrationError, match=r"timestamps of episode 0 do not fit its video .*: step 3 has 0.360 s, and"
    ):
        shown(far, 0)
    odd = at(3, float("nan"), dataset(tmp_path / "f", version, True))
    with pytest.raises(CalibrationError, match=r"timestamps of episode 0 do not fit its video .*: step 3 has nan s"):
        shown(odd, 0)


def test_timestamps_that_run_at_another_rate_are_refused(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", "v2.1", True)
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps({**info, "fps": 8}))
    assert shown(folder, 1) == wanted(1), "by their timestamps the rows are those of the frames"
    for path in folder.glob("data/*/*.parquet"):
        edit(path, lambda rows: setting("timestamp", [row["frame_index"] / 8 for row in rows])(rows))
    with pytest.raises(CalibrationError, match=r"has no frame at 0.250 s, where .* runs at another rate"):
        shown(folder, 1)


@pytest.mark.parametrize("tasks", ["absent", "null"])
def test_an_index_without_tasks_is_read_by_the_rows(tmp_path: Path, tasks: str) -> None:
    folder = dataset(tmp_path / "d", "v3.0", False)
    edit(index_of(folder), dropping("tasks") if tasks == "absent" else setting("tasks", [None] * 3))
    found = [load() for load in find_recordings(folder, Drawn()).loaders]
    assert [one.unit.task for one in found] == [SENTENCES[episode % 2] for episode in range(3)]
    (only,) = find_recordings(folder, Drawn(), tasks=(SENTENCES[1],)).loaders
    assert only().name == "episode 1"
    with pytest.raises(CalibrationError, match="has no task 'fly'; it has 'push the puck', 'reach the ball'"):
        find_recordings(folder, Drawn(), tasks=("fly",))


def test_tasks_that_are_null_in_a_line_are_read_by_the_rows(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", "v2.1", False)
    path = folder / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace('["push the puck"]', "null"))
    assert find_recordings(folder, Drawn()).loaders[1]().unit.task == SENTENCES[1]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("data/chunk_index", [0.0] * 3),
        (f"videos/{KEY}/file_index", [0.0] * 3),
        (f"videos/{KEY}/from_timestamp", ["0"] * 3),
        ("data/file_index", [None] * 3),
    ],
)
def test_the_index_is_blamed_for_what_is_wrong_in_it(tmp_path: Path, name: str, values: list[Any]) -> None:
    folder = dataset(tmp_path / "d", "v3.0", True)
    edit(index_of(folder), setting(name, values))
    with pytest.raises(
        CalibrationError, match=rf"meta/episodes/chunk-000/file-000.parquet of .*{name} of episode 0 is"
    ):
        shown(folder, 0)
    edit(index_of(folder), dropping(name))
    with pytest.raises(
        CalibrationError, match=rf"meta/episodes/chunk-000/file-000.parquet of .*has no column '{name}'"
    ):
        shown(folder, 0)


def test_one_camera_of_several_is_renamed(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", "v2.1", False)
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["observation.images.hand"] = info["features"][KEY]
    (folder / "meta/info.json").write_text(json.dumps(info))
    for path in folder.glob("data/*/*.parquet"):
        edit(path, lambda rows: [row.update({"observation.images.hand": row[KEY]}) for row in rows])
    policy: Any = Drawn()
    policy.cameras = ("wrist", "image")
    found = find_recordings(folder, policy, cameras={"wrist": "hand"})
    assert tuple(found.loaders[0]().images) == policy.cameras


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, None], ids=str)
@pytest.mark.parametrize("name", ["action", "observation.state"])
def test_a_number_that_is_not_finite_is_named_before_the_replay(tmp_path: Path, name: str, value: Any) -> None:
    folder = dataset(tmp_path / "d", "v2.1", False)

    def change(rows: Rows) -> None:
        rows[2][name] = [row if place != 1 else value for place, row in enumerate(rows[2][name])]

    edit(folder / "data/chunk-000/episode_000001.parquet", change)
    policy = Drawn()
    what = "action" if name == "action" else "state"
    with pytest.raises(CalibrationError, match=rf"the {what} of episode 1 is .* in dimension 1 at step 2, which is no"):
        replay(policy, [], find_recordings(folder, policy))
    assert not policy.seen, "nothing was replayed"


@pytest.mark.parametrize("name", ["actions", "proprio"])
def test_a_trace_with_a_number_that_is_not_finite_is_named_before_the_replay(tmp_path: Path, name: str) -> None:
    write_trace(tmp_path, made_up_trace(0))
    array = getattr(made_up_trace(1), name).copy()
    array[3, ..., 2] = np.nan
    write_trace(tmp_path, made_up_trace(1, **{name: array}))
    policy = Drawn()
    with pytest.raises(CalibrationError, match=r"of fake task 0 \(reach\) from initial state 1 is nan in dimension 2"):
        replay(policy, [], find_recordings(tmp_path, policy))
    assert not policy.seen


@pytest.mark.parametrize(
    "template",
    [
        "../../outside.parquet",
        "/etc/passwd",
        "data/../../outside.parquet",
        "{chunk_index.__class__.__mro__}",
        "{chunk_index:>3000000000}",
        "{chunk_index!r}",
        "{0}",
        "{other}",
        "data/{",
    ],
)
@pytest.mark.parametrize("name", ["data_path", "video_path"])
def test_a_path_cannot_lead_out_of_the_folder_or_read_attributes(tmp_path: Path, name: str, template: str) -> None:
    folder = dataset(tmp_path / "d", "v3.0", True)
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps({**info, name: template}))
    with pytest.raises(
        CalibrationError, match=rf"meta/info.json of .*\({name} (leads to|is) '.*(outside of|filled in)"
    ):
        shown(folder, 0)


@pytest.mark.parametrize("path", ["../outside.png", "/etc/hostname", "images/../../outside.png", None])
def test_an_image_cannot_lie_outside_of_the_folder(tmp_path: Path, path: str | None) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "outside.png")
    folder = dataset(tmp_path / "d", "v2.1", False)
    edit(folder / "data/chunk-000/episode_000000.parquet", setting(KEY, [{"bytes": None, "path": path}] * 4))
    with pytest.raises(CalibrationError, match=r"episode_000000.parquet of .*the path of an image (leads to|is)"):
        shown(folder, 0)


def test_an_image_beside_the_rows_is_read(tmp_path: Path) -> None:
    from PIL import Image

    folder = dataset(tmp_path / "d", "v2.1", False)
    (folder / "images").mkdir()
    Image.fromarray(np.full((32, 32, 3), 77, np.uint8)).save(folder / "images/a.png")
    edit(folder / "data/chunk-000/episode_000000.parquet", setting(KEY, [{"bytes": None, "path": "images/a.png"}] * 4))
    assert shown(folder, 0) == [77.0] * 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fps": 0}, "fps is 0, not above 0"),
        ({"fps": float("nan")}, "fps is nan, not a finite number"),
        ({"fps": "10"}, "fps is '10', not a finite number"),
        ({"fps": None}, "fps is None"),
        ({"chunks_size": 0}, "chunks_size is 0, not 1 or more"),
        ({"chunks_size": 1.5}, "chunks_size is 1.5, not a whole number"),
        ({"features": None}, "features is None, not an object"),
        ({"features": {"action": []}}, "the feature action is .*, not an object"),
        ({"features": {"action": {"shape": [4]}}}, "dtype is missing"),
        (
            {"features": {"action": {"dtype": "x"}, "observation.state": {"dtype": "x", "shape": []}}},
            "shape has 0 values",
        ),
        ({"data_path": None}, "data_path is None, not text"),
        ({"codebase_version": 3}, "codebase_version is 3, not text"),
    ],
)
def test_info_of_wrong_types_is_one_sentence(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    folder = dataset(tmp_path / "d", "v2.1", False)
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps({**info, **changes}))
    with pytest.raises(CalibrationError, match=rf"^meta/info.json of the LeRobot dataset .* cannot be read \({told}"):
        shown(folder, 0)


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000, '"\\ud800"', "\udc80"], ids=str.__len__)
def test_a_damaged_json_file_is_one_sentence(tmp_path: Path, content: str) -> None:
    folder = dataset(tmp_path / "d", "v2.1", False)
    for name in ("tasks.jsonl", "episodes.jsonl", "info.json"):
        path = folder / "meta" / name
        whole = path.read_bytes()
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(
            CalibrationError, match=rf"meta/{name} of the LeRobot dataset|has no episodes|is in no row of"
        ):
            shown(folder, 0)
        path.write_bytes(whole)
