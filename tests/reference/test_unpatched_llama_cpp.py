"""A converted file in the pinned llama.cpp without the patches, which knows nothing of it: no change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.builds import environment, stock
from helpers.model_files import random_scores
from helpers.models import NAMES, test_model
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.convert import convert

# Reads a text prompt, and one of embeddings as an image's are, and decodes greedily: every step's logits.
# argv: what of eviction ("stock": it must not be there, "off": switch it off), model files, .npy file
CLIENT = """
import ctypes, sys
import numpy as np
import llama_cpp.llama_cpp as lib

mode, *paths, out = sys.argv[1:]
quiet = lib.llama_log_callback(lambda level, text, data: None)
lib.llama_log_set(quiet, None)
lib.llama_backend_init()
patched = hasattr(lib._lib, "llama_init_from_model_heads")
assert patched == (mode == "off")
rows = []
for path in paths:
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    n_embd = lib.llama_model_n_embd_inp(model)
    rng = np.random.default_rng(0)
    # M-RoPE wants more than one position for an embedding
    mrope = lib.llama_model_rope_type(model) & lib.LLAMA_ROPE_TYPE_MROPE
    for kind in ("text",) if mrope else ("text", "embeddings"):
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = 1
        if patched:
            from sparsemm_edge.runtime.library import new_context, require_patched

            require_patched()
            ctx = new_context(model, params, None)
        else:
            ctx = lib.llama_init_from_model(model, params)
        for step in range(17):
            n = 1 if step else 150
            batch = lib.llama_batch_init(n, 0 if step or kind == "text" else n_embd, 1)
            batch.n_tokens = n
            if step:
                batch.token[0] = int(rows[-1].argmax())
            elif kind == "text":
                for i, token in enumerate(rng.integers(5, n_vocab - 8, n)):
                    batch.token[i] = int(token)
            else:
                embd = np.ctypeslib.as_array(batch.embd, (n, n_embd))
                embd[:] = rng.normal(0, 0.3, embd.shape)
            for i in range(n):
                batch.pos[i], batch.n_seq_id[i], batch.logits[i] = (step and 149 + step) + i, 1, i == n - 1
                batch.seq_id[i][0] = 0
            assert lib.llama_decode(ctx, batch) == 0
            lib.llama_batch_free(batch)
            rows.append(np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, -1), (n_vocab,)).copy())
        lib.llama_free(ctx)
    lib.llama_model_free(model)
np.save(out, np.array(rows).reshape(len(paths), -1, n_vocab))
"""


def logits(mode: str, libraries: Path | None, paths: list[Path], out: Path) -> np.ndarray:
    """float32 [files, steps, n_vocab]."""
    command = [sys.executable, "-c", CLIENT, mode, *map(str, paths), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, env=environment(libraries))
    assert done.returncode == 0, done.stderr
    return np.asarray(np.load(out))


@pytest.mark.parametrize("name", NAMES)
def test_stock_llama_cpp_computes_from_a_converted_file_what_it_computes_from_the_original(
    name: str, tmp_path: Path
) -> None:
    """Bit for bit; and so does the patched one where eviction is switched off."""
    model = test_model(name).gguf()
    converted = convert(
        model, random_scores(model, tmp_path), tmp_path / "c.gguf", spec=BudgetSpec(budget=48, window=16)
    ).path
    original, found = logits("stock", stock(), [model, converted], tmp_path / "stock.npy")
    assert len(original) >= 17 and np.ptp(original) > 1
    assert np.array_equal(original, found)
    assert np.array_equal(original, logits("off", None, [converted], tmp_path / "off.npy")[0])
