"""What commands say: figures that make sense, whole lines, and a failure where nothing worked."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command_line import CommandLine
from sparsemm_edge.demo import DemoModel
from sparsemm_edge.output import print_table, progress_bar
from sparsemm_edge.profiling.progress import Progress
from sparsemm_edge.runtime.context import KVStats

FILES = DemoModel()
MIB = 2**20


def test_a_cache_that_evicts_nothing_is_not_said_to_be_a_part_of_another(sparsemm: CommandLine) -> None:
    plain = KVStats(11, 3 * MIB, 3 * MIB, MIB // 8, 11.0, 0)
    assert plain.in_words() == "3.0 MiB allocated, 0.1 MiB in use: all 11 positions, none evicted"
    evicted = KVStats(600, MIB, 2 * MIB, 7 * MIB, 64.2, 1)
    assert evicted.in_words() == "1.0 MiB of 7.0 MiB unevicted; 64 of 600 positions a head"
    done = sparsemm("generate", "-m", FILES.model, "-p", "x", "-n", 2, "--threads", 1)
    assert "none evicted" in done.err and "unevicted" not in done.err


def test_an_evaluation_in_which_every_question_failed_is_a_failure(
    tmp_path: Path, sparsemm: CommandLine
) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.png").write_bytes(b"no picture")
    arguments = ("eval", "-m", FILES.model, "--mmproj", FILES.mmproj, "--scores", FILES.scores)
    out = tmp_path / "out"
    refusal = sparsemm(*arguments, "--fidelity-only", tmp_path / "pages", "--out", out, "--json").refusal
    assert "no question could be answered" in refusal and "a.png: not an image" in refusal
    assert str(out / "results.jsonl") in refusal


def test_nothing_wraps_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    words = "many words of one line, " * 12
    print_table("title", ["a", "b"], [["name", words.strip()]])
    assert words.strip() in capsys.readouterr().out
    with Progress() as progress:
        progress.done(f"{words}[b]end")
    assert f"{words}[b]end\n" in capsys.readouterr().err
    with progress_bar("reading") as step:
        step(1, 2)
    assert capsys.readouterr().err == "", "a bar is for terminals"
    # through a real pipe, too: a table of ten columns
    command = [
        sys.executable,
        "-m",
        "sparsemm_edge.cli",
        "fit",
        str(FILES.model),
        "--scores",
        str(FILES.scores),
    ]
    done = subprocess.run([*command, "--budget", "64", "--window", "8"], capture_output=True, text=True)
    header = next(line for line in done.stdout.splitlines() if line.lstrip().startswith("setting"))
    assert all(word in header for word in ("weights", "vision", "compute", "K+V", "at peak", "total", "fits"))


def test_lines_of_a_narrow_terminal_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal wraps by itself; a line that is cut in two cannot be copied from it."""
    monkeypatch.setenv("COLUMNS", "40")
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with Progress() as progress:
        progress.done("/a/path/that/is/much/longer/than/the/forty/columns/that/there/are.gguf")
    assert "/a/path/that/is/much/longer/than/the/forty/columns/that/there/are.gguf\n" in written.getvalue()


def test_a_question_in_brackets_is_no_markup(tmp_path: Path, sparsemm: CommandLine) -> None:
    done = sparsemm("demo", "--seed", 3, "-p", "[/b] [red] what?", "--budgets", "64", "--out", tmp_path / "d")
    assert done.status == 0 and "[/b] [red] what?" in done.out
