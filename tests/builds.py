"""The other builds of llama.cpp that tests run: `make test` makes them, and where they lack, tests skip."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build_script() -> ModuleType:
    """scripts/build_llama_cpp_python.py as a module."""
    name = "build_llama_cpp_python"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


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
    series = build_script().Series.read(ROOT / "patches")
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
