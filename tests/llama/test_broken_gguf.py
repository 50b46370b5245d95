"""Broken and hostile files: refused in one line, or eviction is off with a warning; never a crash.

llama.cpp runs in the child process of scripts/fuzz_gguf.py, where a crash is a result.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as Kind
from PIL import Image

from fuzz_gguf import BUDGET, N_HEAD, N_HEAD_KV, N_LAYER, WINDOW, Child, write_model
from helpers.builds import environment, stock
from helpers.command_line import CommandLine
from helpers.models import test_model
from helpers.paths import ROOT

N_BUDGETS = N_LAYER * N_HEAD_KV


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    opened = Child(environment())
    yield opened
    opened.close()


def u32(value: int) -> Any:
    return value, Kind.UINT32, None


def u32s(*values: int) -> Any:
    return list(values), Kind.ARRAY, Kind.UINT32


# key: its value and type; what llama.cpp makes of it. The Python readers refuse them all.
BROKEN: list[tuple[str, Any, str]] = [
    # of another type
    ("version", (1, Kind.INT32, None), "refused"),
    ("version", ("1", Kind.STRING, None), "refused"),
    ("window", (WINDOW, Kind.UINT64, None), "refused"),
    ("window", (8.0, Kind.FLOAT32, None), "refused"),
    ("pool_kernel", u32s(7), "refused"),
    ("enabled", u32(1), "refused"),
    ("head_budgets", u32(BUDGET), "refused"),
    ("head_budgets", ([40.0] * N_BUDGETS, Kind.ARRAY, Kind.FLOAT32), "refused"),
    ("head_budgets", ([BUDGET] * N_BUDGETS, Kind.ARRAY, Kind.UINT64), "refused"),
    ("head_budgets", (["40"] * N_BUDGETS, Kind.ARRAY, Kind.STRING), "refused"),
    # missing
    ("window", None, "refused"),
    ("head_budgets", None, "refused"),
    ("version", None, "does not evict"),
    # of a version to come
    ("version", u32(2), "does not evict, warned"),
    # out of range
    ("window", u32(0), "does not evict, warned"),
    ("window", u32(2**32 - 1), "does not evict, warned"),
    ("pool_kernel", u32(0), "does not evict, warned"),
    ("pool_kernel", u32(8), "does not evict, warned"),
    # of a length that does not fit, or below the window
    ("head_budgets", u32s(BUDGET), "does not evict, warned"),
    ("head_budgets", u32s(*[BUDGET] * (N_BUDGETS + 1)), "does not evict, warned"),
    ("head_budgets", u32s(*[BUDGET] * (N_BUDGETS - 1), 0), "does not evict, warned"),
    ("head_budgets", u32s(*[BUDGET] * (N_BUDGETS - 1), WINDOW - 1), "does not evict, warned"),
    # the library does not read the scores
    ("head_scores", ([float("nan")] * N_LAYER * N_HEAD, Kind.ARRAY, Kind.FLOAT32), "evicts"),
    ("head_scores", ([0.125] * 3, Kind.ARRAY, Kind.FLOAT32), "evicts"),
    ("policy", u32(1), "evicts"),
    ("floor_ratio", (float("nan"), Kind.FLOAT32, None), "evicts"),
]


@pytest.mark.parametrize(("key", "value", "result"), BROKEN)
def test_a_broken_key_is_refused_or_switches_eviction_off(
    key: str, value: Any, result: str, child: Child, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "m.gguf", {f"sparsemm.{key}": value})
    assert child.attempt(path) == ("refused", result)


def test_budgets_of_any_size_take_no_more_memory_than_the_prompt(child: Child, tmp_path: Path) -> None:
    """Sums of them overflow 32 bits, and the child may take 4 GiB."""
    budgets = u32s(2**32 - 1, 2**31, WINDOW, 2**32 - 1)
    path = write_model(tmp_path / "m.gguf", {"sparsemm.head_budgets": budgets})
    assert child.attempt(path) == ("read", "evicts")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 3e4])
def test_keys_that_are_no_numbers_are_evicted_without_a_crash(
    weight: float, child: Child, tmp_path: Path
) -> None:
    """A sort of votes that are NaN goes wherever it likes; 3e4: keys overflow in f16."""
    assert child.attempt(write_model(tmp_path / "m.gguf", weight=weight)) == ("read", "evicts")


def test_hundreds_of_files_with_a_broken_head(tmp_path: Path) -> None:
    """The short version of the fuzz run; its seed is fixed, so that a failure stays."""
    command = [sys.executable, str(ROOT / "scripts" / "fuzz_gguf.py"), "--seed", "1", "--cases", "300"]
    command += ["--seconds", "600", "--out", str(tmp_path / "fuzz")]
    command += ["--stock", str(stock())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed (seed 1)" in done.stdout


# --- images


def png(path: Path, width: int, height: int) -> Path:
    Image.new("L", (width, height), 128).save(path)
    return path


def truncated(path: Path) -> Path:
    data = png(path, 200, 200).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def bytes_of(data: bytes) -> Any:
    def write(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return write


def huge(path: Path) -> Path:
    """A PNG of 20000 x 20000 black pixels, one bit each, written without making them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(20000 * (1 + 2500)), 1)
    head = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(truncated, id="truncated"),
        pytest.param(bytes_of(b""), id="empty"),
        pytest.param(bytes_of(b"A text about a picture.\n" * 99), id="text"),
        pytest.param(bytes_of(b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n"), id="pdf"),
        pytest.param(bytes_of(b"\x89PNG\r\n\x1a\n" + b"\xff" * 500), id="png-of-noise"),
        pytest.param(huge, id="20000x20000"),
        pytest.param(folder, id="folder"),
    ],
)
def test_a_file_that_is_no_picture_is_one_line(make: Any, tmp_path: Path, sparsemm: CommandLine) -> None:
    files = test_model("llava")
    arguments = ["generate", "-m", files.gguf(), "--mmproj", files.mmproj(), "-n", 1, "-p", "x"]
    image = make(tmp_path / "page.png")
    assert str(image) in sparsemm(*arguments, "--image", image).refusal


def test_a_picture_of_one_pixel_is_a_picture(tmp_path: Path, sparsemm: CommandLine) -> None:
    files = test_model("llava")
    arguments = ["generate", "-m", files.gguf(), "--mmproj", files.mmproj(), "-n", 4, "-p", "x"]
    assert sparsemm(*arguments, "--image", png(tmp_path / "page.png", 1, 1)).status == 0
