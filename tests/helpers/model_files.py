"""What tests make of a model file: head scores, a copy without its chat template."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import model_shape
from sparsemm_edge.scores import HeadScores


def random_scores(model: Path, folder: Path) -> Path:
    """A score file for this model, of random scores."""
    shape = model_shape(read_header(model))
    scores = np.random.default_rng(0).gamma(0.3, size=(shape.n_layer, shape.n_head))
    path = folder / "scores.json"
    HeadScores("random", scores, shape.n_head_kv, {"dataset": "random"}).save(path)
    return path


def without_template(model: Path, out: Path) -> Path:
    """A copy of a model file whose chat template has another key."""
    data = model.read_bytes()
    key = gguf.Keys.Tokenizer.CHAT_TEMPLATE.encode()
    assert data.count(key) == 1
    out.write_bytes(data.replace(key, key[:-1] + b"X"))
    return out
