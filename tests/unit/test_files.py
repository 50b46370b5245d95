"""Files appear whole or not at all; text and paths are read as people have them, or refused in one line."""

import codecs
import os
import shlex
from pathlib import Path

import pytest

from sparsemm_edge import SparseMMError
from sparsemm_edge.files import atomic_path, check_text, pasted_path, read_json, read_json_lines, read_text


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


def test_a_directory_is_not_written_over(tmp_path: Path) -> None:
    for target in (tmp_path, Path("/")):
        with pytest.raises(SparseMMError, match="it is a directory"), atomic_path(target):
            pass


def test_what_is_no_text_file_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xe9t\xe9")
    for name, said in (
        ("file", r"/file: not a text file \("),
        ("nowhere", "^cannot read .*/nowhere: No such file or directory$"),
        ("", "^cannot read .*: Is a directory$"),
    ):
        with pytest.raises(SparseMMError, match=said):
            read_text(tmp_path / name)


@pytest.mark.parametrize("text", ["", "a", '{"a": "é\U0001f600\u2028"}\r\n', "{# é #}{{ x }}"])
def test_a_mark_is_no_text_and_utf_16_is_read(text: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    forms = [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ]
    forms += [(codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (b"", "utf-8")]
    if text.startswith("{"):  # where the zeros are tells as much
        forms += [(b"", "utf-16-le"), (b"", "utf-16-be")]
    for mark, encoding in forms:
        file.write_bytes(mark + text.encode(encoding))
        assert read_text(file) == text


def test_json_is_read_with_a_mark_and_refused_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    assert read_json(file) == {"a": 1}
    for data in (b"", b"{", b"[" * 100_000, b"9" * 5000, "{'a': 1}".encode("utf-16")):
        file.write_bytes(data)
        with pytest.raises(SparseMMError, match="file: not a JSON file"):
            read_json(file)


def test_a_line_of_json_lines_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    file = tmp_path / "file"
    ends = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"
    file.write_text(f'\ufeff{{"a": "{ends}"}}\r\n\n \n"{ends}"', encoding="utf-8", newline="")
    assert list(read_json_lines(file)) == [(1, {"a": ends}), (4, ends)]
    file.write_bytes(b'"a"\n"\n')
    with pytest.raises(SparseMMError, match=r"file, line 2: not JSON \(Unterminated string"):
        list(read_json_lines(file))


def test_half_a_character_is_named() -> None:
    check_text("é\U0001f600", "it")
    with pytest.raises(SparseMMError, match=r"^it is not UTF-8: '\\udcff' at character 3$"):
        check_text("ab\udcff", "it")


@pytest.mark.parametrize(
    "name", ["page.png", "my page.png", "it's.png", 'a "b".png', "é%20$x.png", "a\\ b.png"]
)
def test_a_pasted_path_is_found_however_it_is_written(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.touch()
    escaped = "".join(each if each.isalnum() or each in "/._-é" else f"\\{each}" for each in str(file))
    forms = [
        str(file),
        f" {file}\t",
        shlex.quote(str(file)),
        escaped,
        file.as_uri(),
        f"file://localhost{file.as_uri()[7:]}",
    ]
    if "'" not in name:
        forms.append(f"'{file}'")
    if not set('"$\\') & set(name):
        forms.append(f'"{file}"')
    for form in forms:
        assert pasted_path(form) == file, form


def test_a_path_that_leads_nowhere_stays_as_it_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "page.png").touch()
    assert pasted_path("~/page.png") == tmp_path / "page.png"
    for text in ("~nobody-of-this-name/x.png", "no where.png", "it's", "", "a\0b", "\udcff.png"):
        assert pasted_path(text) == Path(text)


@pytest.mark.skipif(os.name == "nt", reason="there a backslash is no escape")
def test_a_file_of_exactly_this_name_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("'page.png'", "page.png", "a\\ b.png", "a b.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert pasted_path("'page.png'") == Path("'page.png'")
    assert pasted_path("a\\ b.png") == Path("a\\ b.png")
