"""A prompt read once serves any head budgets: kept and said is what a fresh reading keeps and says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helpers.contexts import POOL_KERNEL, random_table
from sparsemm_edge.budgets import FULL
from sparsemm_edge.runtime import VisionModel
from sparsemm_edge.runtime.context import Context
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.eviction import HeadBudgetTable

QUESTION = "What is written here? Answer briefly, in the words of the page itself."
N_REST = 40  # tokens that are read after the prefix


@pytest.mark.parametrize("name", ["llava", "llava-gqa", "qwen2vl"])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_from_a_prefix_heads_keep_and_say_what_they_do_from_the_whole_prompt(
    name: str, cache_type: str, models: Callable[[str], Any]
) -> None:
    from helpers.models import sample_image

    files = models(name)
    with (
        VisionModel.load(files.gguf(), files.mmproj(), n_threads=1) as model,
        model.tokenize(model.chat_prompt(QUESTION, 1), [sample_image(files.image_size, 7)]) as prompt,
    ):
        shape, n = model.shape, prompt.n_tokens
        options: dict[str, Any] = {
            "n_ctx": n + 16,
            "cache_type_k": cache_type,
            "cache_type_v": cache_type,
            "n_outputs": 16,
        }
        everything = np.full((shape.n_layer, shape.n_head_kv), FULL, dtype=np.uint32)
        encoded = encode(model, prompt)
        before, after = encoded.split(n - N_REST)
        with Context(model, HeadBudgetTable(everything, 1, POOL_KERNEL), **options) as context:
            context.append(before)
            prefix = context.state()
        for budget, window, seed in ((12, 5, 0), (40, 16, 1), (n // 2, N_REST, 2)):
            table = HeadBudgetTable(random_table(model, budget, window, n, seed), window, POOL_KERNEL)
            with Context(model, table, **options) as context:
                context.prefill(encoded)
                whole, logits = context.kept(), [context.logits()]
                tokens = []
                for _ in range(10):
                    tokens.append(int(logits[-1].argmax()))
                    context.decode(tokens[-1])
                    logits.append(context.logits())
                stats = context.kv_stats()
            with Context(model, table, **options) as context:
                context.restore(prefix)
                context.prefill(after)
                # ties aside, which flash attention's rounding of another batch decides
                agree = [
                    len(np.intersect1d(a, b)) / len(a)
                    for heads, others in zip(whole, context.kept(), strict=True)
                    for a, b in zip(heads, others, strict=True)
                ]
                assert np.mean(agree) > 0.99
                again = np.concatenate(
                    [context.logits()[None], context.decode_all(np.array(tokens, np.int32))]
                )
                behind = again[:-1].max(axis=1) - again[np.arange(len(tokens)), tokens]
                assert behind.max() < 0.2 * again.std(), "another token than by a near tie"
                error = np.linalg.norm(again - np.array(logits), axis=1) / np.linalg.norm(logits, axis=1)
                assert error.max() < 0.2  # what a tie at the cut makes
                assert context.kv_stats().bytes_now == stats.bytes_now
                # the tail can be taken back to any place, and goes on as before
                context.truncate_reply(4)
                context.decode(tokens[4])
                assert np.linalg.norm(context.logits() - logits[5]) < 0.2 * np.linalg.norm(logits[5])
