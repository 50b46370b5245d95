"""Claims about scripts/build_llama_cpp_python.py, on a source distribution of three files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

import build_llama_cpp_python as build

FILES = {
    "llama_cpp/__init__.py": '__version__ = "0.0.1"\n',
    "CMakeLists.txt": 'set(LLAMA_BUILD_COMMON ON CACHE BOOL "" FORCE)\n',
    "vendor/llama.cpp/src/llama.cpp": "int one;\nint two;\nint three;\n",
    "vendor/llama.cpp/.git": "gitdir: elsewhere\n",
    ".gitignore": "lib/\n",
    "vendor/lib/ignored.txt": "published although .gitignore names it\n",
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sdist.tar.gz, patches/pin.json and an empty user cache."""
    source = tmp_path / "llama_cpp_python-0.0.1"
    for name, text in FILES.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARSEMM_SDIST", str(tmp_path / "sdist.tar.gz"))
    monkeypatch.delenv("CMAKE_ARGS", raising=False)

    (source / "vendor/llama.cpp/.git").unlink()
    shell(source, "git init -q --object-format=sha1 && git add -A -f")
    pin = {
        "project": "llama-cpp-python",
        "version": "0.0.1",
        "sha256": hashlib.sha256((tmp_path / "sdist.tar.gz").read_bytes()).hexdigest(),
        "tree": shell(source, "git write-tree").strip(),
        "llama_cpp_commit": "0000000",
        "local_version": 7,
    }
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches/pin.json").write_text(json.dumps(pin))
    return tmp_path


def shell(folder: Path, command: str) -> str:
    identity = {f"GIT_{role}_{k}": "t@t" for role in ("AUTHOR", "COMMITTER") for k in ("NAME", "EMAIL")}
    return subprocess.check_output(
        ["sh", "-c", command], cwd=folder, env={**os.environ, **identity}, text=True
    )


def run(workspace: Path, *arguments: str) -> int:
    return build.main(["--patches", str(workspace / "patches"), *arguments])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which must be the only one that is an error."""
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert lines[-1].startswith("error: ")
    return lines[-1]


def add_commit(tree: Path, old: str, new: str, subject: str) -> None:
    path = tree / "vendor/llama.cpp/src/llama.cpp"
    path.write_text(path.read_text().replace(old, new))
    shell(tree, f"git add -A && git commit -q -m '{subject}'")


def series_of_two(workspace: Path) -> dict[str, bytes]:
    tree = workspace / "made"
    assert run(workspace, "unpack", str(tree)) == 0
    add_commit(tree, "two", "zwei", "[llama] count in German")
    add_commit(tree, "three", "drei", "count further")
    assert run(workspace, "export", str(tree)) == 0
    return {path.name: path.read_bytes() for path in (workspace / "patches").glob("*.patch")}


def test_unpack_then_export_reproduces_the_series_byte_for_byte(workspace: Path) -> None:
    series = series_of_two(workspace)
    assert sorted(series) == ["0001-llama-count-in-German.patch", "0002-count-further.patch"]
    assert run(workspace, "unpack", str(workspace / "again")) == 0
    assert run(workspace, "export", str(workspace / "again")) == 0
    assert {path.name: path.read_bytes() for path in (workspace / "patches").glob("*.patch")} == series


def test_unpacking_twice_gives_the_same_commits(workspace: Path) -> None:
    series_of_two(workspace)
    heads = []
    for name in ("first", "second"):
        assert run(workspace, "unpack", str(workspace / name)) == 0
        heads.append(shell(workspace / name, "git rev-parse HEAD"))
    assert heads[0] == heads[1]
    assert shell(workspace / "first", "git log --format=%s").splitlines() == [
        "count further",
        "[llama] count in German",
        "llama-cpp-python 0.0.1, as published",
    ]


def test_export_drops_the_patch_of_a_commit_that_is_gone(workspace: Path) -> None:
    series_of_two(workspace)
    shell(workspace / "made", "git reset -q --hard HEAD~1")
    assert run(workspace, "export", str(workspace / "made")) == 0
    assert len(list((workspace / "patches").glob("*.patch"))) == 1


def test_an_empty_series_is_the_published_source(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(workspace, "source") == 0
    source = Path(capsys.readouterr().out.strip())
    files = {str(path.relative_to(source)): path.read_text() for path in source.rglob("*") if path.is_file()}
    assert files == {name: text for name, text in FILES.items() if not name.endswith("/.git")}


def test_source_is_made_once_and_again_when_the_series_changes(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = []
    for _ in range(2):
        assert run(workspace, "source") == 0
        sources.append(capsys.readouterr().out)
    series_of_two(workspace)
    capsys.readouterr()
    assert run(workspace, "source") == 0
    sources.append(capsys.readouterr().out)
    assert sources[0] == sources[1] != sources[2]
    assert "int zwei;" in (Path(sources[2].strip()) / "vendor/llama.cpp/src/llama.cpp").read_text()


def test_a_wrong_checksum_is_one_line(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (workspace / "sdist.tar.gz").open("ab") as file:
        file.write(b"x")
    assert run(workspace, "unpack", str(workspace / "tree")) == 2
    assert "wrong checksum" in error_line(capsys)
    assert not (workspace / "tree").exists()


def test_a_patch_that_does_not_apply_is_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series_of_two(workspace)
    second = workspace / "patches/0002-count-further.patch"
    second.write_text(second.read_text().replace("-int three", "-int four"))
    capsys.readouterr()
    assert run(workspace, "source") == 2
    line = error_line(capsys)
    assert "0002-count-further.patch" in line and "does not apply" in line


def test_a_missing_compiler_is_one_line_and_says_what_to_install(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(workspace))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert run(workspace, "build") == 2
    assert "no C compiler found" in (line := error_line(capsys)) and "apt install gcc g++" in line


def test_exporting_a_dirty_tree_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series = series_of_two(workspace)
    (workspace / "made/CMakeLists.txt").write_text("changed")
    assert run(workspace, "export", str(workspace / "made")) == 2
    assert "uncommitted" in error_line(capsys)
    assert {path.name for path in (workspace / "patches").glob("*.patch")} == set(series)


def test_exporting_another_repository_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = workspace / "other"
    other.mkdir()
    shell(other, "git init -q && touch a && git add a && git commit -q -m a")
    assert run(workspace, "export", str(other)) == 2
    assert "first commit is not llama-cpp-python 0.0.1" in error_line(capsys)
    assert run(workspace, "export", str(workspace)) == 2
    assert "not a git tree" in error_line(capsys)


def test_unpack_never_writes_into_a_folder_with_files(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(workspace, "unpack", str(workspace)) == 2
    assert "not empty" in error_line(capsys)


def test_what_is_built_is_kept_by_cmake_args_and_all_but_stock_by_series(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def places() -> tuple[Path, ...]:
        series = build.Series.read(workspace / "patches")
        return series.wheel_dir(), series.tools_dir(), series.stock_dir()

    unpatched = places()
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_BLAS=ON")
    blas = places()
    monkeypatch.delenv("CMAKE_ARGS")
    series_of_two(workspace)
    patched = places()
    assert [len(set(kind)) for kind in zip(unpatched, blas, patched, strict=True)] == [3, 3, 2]
    assert patched[2] == unpatched[2]


def test_the_shipped_pin_is_the_version_that_the_edits_expect() -> None:
    series = build.Series.read(build.ROOT / "patches")
    assert series.version == "0.3.36"
    assert series.sha256 == "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"


def test_the_edits_for_other_machines_fit_the_pinned_source(tmp_path: Path) -> None:
    """All backends go into the package, which loads them: ggml would look for them beside the program."""
    series = build.Series.read(build.ROOT / "patches")
    source = build.cache_dir("source") / series.key()
    if not source.is_dir():
        pytest.skip("not unpacked: python scripts/build_llama_cpp_python.py source")
    edits = (*build.BUILD_EDITS, *build.DIST_EDITS)
    for name in {name for name, _, _ in edits}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((source / name).read_bytes())
    build.apply_build_edits(series, tmp_path, edits)
    cmake = (tmp_path / "CMakeLists.txt").read_text()
    assert "llama_cpp_python_install_target(${backend})" in cmake
    assert "install_target(ggml-cpu)" not in cmake
    loader = (tmp_path / "llama_cpp" / "llama_cpp.py").read_text()
    assert loader.index("_lib = ") < loader.index("_load_backends(os.fsencode(_base_path))")
    compile(loader, "llama_cpp.py", "exec")
