"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.command_line import CommandLine, Done
from helpers.paths import HELPERS

if TYPE_CHECKING:
    from sparsemm_edge.runtime import VisionModel


@pytest.fixture
def sparsemm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """`sparsemm(*arguments)` runs the command line in this process.

    What llama.cpp writes past Python is captured too; the terminal is so wide that no table wraps.
    """
    from sparsemm_edge import cli

    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["sparsemm-edge", *map(str, arguments)])
        capfd.readouterr()  # what was written before is not the command's
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return Done(int(exit_.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def models() -> Callable[[str], object]:
    """`models(name)` is the test model of that name; the first use makes them all, in seconds."""
    from helpers.models import test_model  # imports torch: only for tests that want a model

    return test_model


@pytest.fixture(scope="module")
def llava() -> Iterator[VisionModel]:
    """The small LLaVA with its image encoder, as its files say; a module may have another of this name."""
    from helpers.models import test_model
    from sparsemm_edge.runtime import VisionModel

    files = test_model("llava")
    with VisionModel.load(files.gguf("f16"), files.mmproj("f16"), n_threads=1) as opened:
        yield opened


@pytest.fixture
def pages(tmp_path: Path) -> list[Path]:
    """The files of two different images, as large as that LLaVA takes them."""
    from helpers.models import sample_image, test_model

    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for seed, path in enumerate(paths):
        sample_image(test_model("llava").image_size, seed).save(path)
    return paths


@pytest.fixture(scope="session")
def preloaded_alloc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alloc.cpp as a library for LD_PRELOAD."""
    if sys.platform != "linux" or not (compiler := shutil.which("c++")):
        pytest.skip("LD_PRELOAD and a C++ compiler are needed")
    library = tmp_path_factory.mktemp("preload") / "alloc.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HELPERS / "alloc.cpp"], check=True)
    return library
