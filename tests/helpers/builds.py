"""The other builds of llama.cpp that tests run: `make test` makes them, and where they lack, tests skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from build_llama_cpp_python import Series
from helpers.paths import ROOT


def tools() -> Path:
    """The folder of llama-server, llama-mtmd-cli, ggml-rpc-server and their libraries, of the patched source.

    SPARSEMM_TOOLS names another one, for work on the patches.
    """
    return _built("SPARSEMM_TOOLS", "tools")


def stock() -> Path:
    """The folder of the unpatched llama.cpp's libraries; SPARSEMM_STOCK names another one."""
    return _built("SPARSEMM_STOCK", "stock")


def _built(variable: str, command: str) -> Path:
    given = os.environ.get(variable)
    series = Series.read(ROOT / "patches")
    folder: Path = Path(given) if given else getattr(series, f"{command}_dir")()
    if not folder.is_dir():
        pytest.skip(f"not built: python scripts/build_llama_cpp_python.py {command}")
    return folder


def environment(libraries: Path | None = None) -> dict[str, str]:
    """This process's environment, with llama-cpp-python on other libraries if a folder is given."""
    changes = {"OMP_NUM_THREADS": "1"}
    if libraries is not None:
        changes |= dict.fromkeys(("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"), str(libraries))
    return os.environ | changes
