"""Files appear whole or not at all; text that cannot be read is one line."""

from pathlib import Path

import pytest

from sparsemm_edge import SparseMMError
from sparsemm_edge.files import atomic_path, read_text


def test_a_finished_file_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with atomic_path(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    for failure, shown in ((ValueError("no"), ValueError), (OSError(28, "disk full"), SparseMMError)):
        with pytest.raises(shown, match=r"no|cannot write .*file: disk full"), atomic_path(target) as part:
            part.write_text("half")
            raise failure
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(SparseMMError, match=r"there is no directory .*nowhere"),
        atomic_path(tmp_path / "nowhere" / "file"),
    ):
        pass


def test_what_is_no_text_file_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    for name, said in (
        ("file", r"/file: not a text file \("),
        ("nowhere", "^cannot read .*/nowhere: No such file or directory$"),
        ("", "^cannot read .*: Is a directory$"),
    ):
        with pytest.raises(SparseMMError, match=said):
            read_text(tmp_path / name)
