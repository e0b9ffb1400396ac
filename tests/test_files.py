"""Files are written whole, in the place of regular files alone, and checked before the work."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from softcl.files import check_folder, check_target, read_file, replace_file, user_path


def test_links_are_followed_and_modes_stay(tmp_path: Path):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real/file"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to("real/file")
    replace_file(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    new = tmp_path / "dangling"
    new.symlink_to("real/other")
    replace_file(new, b"first")
    assert new.is_symlink() and (tmp_path / "real/other").read_bytes() == b"first"
    previous = os.umask(0o027)
    try:
        replace_file(tmp_path / "fresh", b"")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640
    assert len(list(tmp_path.rglob("*"))) == 6  # nothing is left over


def test_what_is_no_file_is_refused_before_and_after(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/null")
    for name, reason in (
        ("pipe", "not a regular file"),
        ("device", "not a regular file"),
        ("loop", "symbolic links"),
        ("", "is a folder"),
        ("missing/file", "No such file or directory"),
        ("n" * 300, "File name too long"),
    ):
        path = tmp_path / name
        for call in (check_target, lambda path: replace_file(path, b"x")):
            with pytest.raises(OSError, match=reason) as caught:
                call(path)
            assert caught.value.filename == str(path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["device", "loop", "pipe"]


def test_temporary_names_are_ones_own(tmp_path: Path, monkeypatch):
    """Whoever knows the name of a file knows nothing of where it is written first."""
    seen = []

    def look(_: int) -> None:
        seen.append(sorted(os.listdir(tmp_path)))

    monkeypatch.setattr("softcl.files.os.fsync", look)
    for _ in range(2):
        replace_file(tmp_path / "file", b"x")
    first, second = seen[0][0], seen[2][0]
    assert first != second and first.startswith(".file.") and first.endswith(".tmp")
    monkeypatch.setattr("softcl.files.secrets.token_hex", lambda _: "known")
    (tmp_path / ".file.known.tmp").symlink_to("/dev/null")
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "file", b"y")


def test_a_folder_that_nothing_can_be_written_to(tmp_path: Path):
    check_folder(tmp_path / "made/later")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(OSError):
            check_folder(path)


def test_what_may_never_end_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            read_file(path)
    nobody = ("~nosuchuser/x", "no such user")
    for text, reason in (nobody, ("a\0b", "zero byte"), ("\ud800", "no text")):
        with pytest.raises(OSError, match=reason):
            user_path(text)
