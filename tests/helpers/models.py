"""The test models (scripts/make_test_models.py), made on demand into the user cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from helpers.paths import ROOT
from make_test_models import SPECS, sample_image

SCRIPT = ROOT / "scripts" / "make_test_models.py"


__all__ = ["NAMES", "TestModel", "sample_image", "test_model", "test_models_dir"]

NAMES = tuple(SPECS)


@dataclass(frozen=True)
class TestModel:
    """One test model: a Hugging Face checkpoint and what was converted from it."""

    __test__ = False  # pytest: not a test class

    name: str
    path: Path
    image_size: int  # side of the square image that nothing resizes

    @property
    def hf(self) -> Path:
        return self.path / "hf"

    def gguf(self, outtype: str = "f16") -> Path:
        return self.path / f"model-{outtype}.gguf"

    def mmproj(self, outtype: str = "f16") -> Path:
        return self.path / f"mmproj-{outtype}.gguf"


def _cache_dir() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sparsemm-edge"


@cache
def test_models_dir() -> Path:
    """The folder of the test models of this script and these package versions; they are made if missing."""
    key = hashlib.sha256()
    converters = (ROOT / "sparsemm_edge" / "mmproj.py", ROOT / "patches" / "pin.json")
    for source in (SCRIPT, *converters):
        key.update(source.read_bytes())
    for package in ("torch", "transformers", "tokenizers", "gguf", "numpy"):
        key.update(f"{package}={version(package)}".encode())
    out = _cache_dir() / "test-models" / key.hexdigest()[:16]
    if not all((out / name).is_dir() for name in NAMES):
        subprocess.run([sys.executable, str(SCRIPT), str(out)], check=True)
    return out


test_models_dir.__test__ = False  # type: ignore[attr-defined]


def test_model(name: str) -> TestModel:
    """The test model of this name, one of `NAMES`."""
    return TestModel(name, test_models_dir() / name, SPECS[name].image_size)


test_model.__test__ = False  # type: ignore[attr-defined]
