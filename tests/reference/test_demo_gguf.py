"""The demo model's GGUF file is what llama.cpp's own converter makes, and is made without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from helpers.paths import ROOT

CHECKPOINT = ROOT / "models" / "demo"

# makes both files where nothing can import what only development needs
WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "tokenizers", "sentencepiece", "safetensors"):
    sys.modules[name] = None
from pathlib import Path
from make_demo_gguf import make
make(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files that the script writes, with an empty cache and without torch."""
    out = tmp_path_factory.mktemp("demo")
    paths = os.pathsep.join(map(str, (ROOT / "scripts", ROOT)))
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(CHECKPOINT), str(out)],
        env=os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(out / "cache")},
        check=True,
    )
    return out


@pytest.fixture(scope="module")
def ours(made: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(made / "model-f16.gguf")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> gguf.GGUFReader:
    """What the converter in the pinned llama.cpp source makes of the same checkpoint."""
    from make_test_models import llama_cpp_source

    out = tmp_path_factory.mktemp("converter") / "model.gguf"
    converter = llama_cpp_source(None) / "convert_hf_to_gguf.py"
    subprocess.run(
        [sys.executable, converter, CHECKPOINT, "--outtype", "f16", "--outfile", out],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return gguf.GGUFReader(out)


def test_every_key_has_the_type_and_value_that_the_converter_gives_it(
    ours: gguf.GGUFReader, theirs: gguf.GGUFReader
) -> None:
    assert _keys(ours) == _keys(theirs)


def test_every_tensor_has_the_type_shape_and_bytes_that_the_converter_gives_it(
    ours: gguf.GGUFReader, theirs: gguf.GGUFReader
) -> None:
    found = {tensor.name: tensor for tensor in ours.tensors}
    assert list(found) and {*found} == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        same = found[tensor.name]
        assert (same.tensor_type, [*same.shape]) == (tensor.tensor_type, [*tensor.shape]), tensor.name
        assert np.array_equal(same.data, tensor.data), tensor.name


def _keys(reader: gguf.GGUFReader) -> dict[str, object]:
    return {name: ([*field.types], field.contents()) for name, field in reader.fields.items()}
