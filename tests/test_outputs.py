"""Files that flags name: what is there stays there until the new content is whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from vla_pruner.errors import OptionError
from vla_pruner.outputs import check_file, replace_file


@pytest.mark.parametrize("full", ["write", "sync"])
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    there = tmp_path / "results.json"
    there.write_bytes(b"hours of work")

    def no_space(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if full == "sync":
            patched.setattr(os, "fsync", no_space)
        else:
            patched.setattr(Path, "open", no_space)
        with pytest.raises(OSError, match="No space left"):
            replace_file(there, b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("results.json", b"hours of work")]
    replace_file(there, b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("results.json", b"new")]


def test_a_file_is_replaced_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    replace_file(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    replace_file(Path("/dev/null"), b"new")
    assert Path("/dev/null").is_char_device()
    opened = Path.open

    def refused(path: Path, *mode: Any, **options: Any) -> Any:
        if path.suffix == ".new":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *mode, **options)

    monkeypatch.setattr(Path, "open", refused)
    replace_file(real, b"in a folder that takes no other files")
    assert real.read_bytes() == b"in a folder that takes no other files"
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "absent", b"new")


def test_links_that_go_round_are_refused_in_a_sentence(tmp_path: Path) -> None:
    round_link = tmp_path / "round"
    round_link.symlink_to(round_link)
    with pytest.raises(OptionError, match="which cannot be written"):
        check_file(str(round_link))
