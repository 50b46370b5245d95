"""Where a prompt ends, in every client's way of sending it; and what happens before it has."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from helpers.contexts import FORTY, append, decode, evict_by, random_table, raw_context, restored, saved
from helpers.models import test_model
from sparsemm_edge.runtime import VisionModel, library
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.library import llama

N_BATCH = 512  # llama-cpp-python's default
TOKENS = [int(t) for t in np.random.default_rng(5).integers(10, 290, 2200)]


@pytest.fixture(scope="module")
def llava() -> Iterator[VisionModel]:
    with VisionModel.load(test_model("llava").gguf("f16"), n_threads=1) as opened:
        yield opened


def kept(ctx: int) -> list[list[int]]:
    memory = llama.llama_get_memory(ctx)
    return [library.heads_positions(memory, il, ih).tolist() for il in range(5) for ih in range(4)]


def n_evictions(ctx: int) -> int:
    stats = library.heads_stats(llama.llama_get_memory(ctx))
    assert stats is not None
    return int(stats.n_evictions)


def n_pos(ctx: int) -> int:
    return int(llama.llama_memory_seq_pos_max(llama.llama_get_memory(ctx), 0)) + 1


def whole(model: VisionModel, prompt: list[int], then: list[int]) -> tuple[np.ndarray, list[list[int]]]:
    """Logits and kept positions after a prompt in one call and some tokens."""
    ctx = raw_context(model, n_ctx=2304, n_batch=2304)
    assert ctx
    logits = decode(ctx, prompt, 0)
    for token in then:
        logits = decode(ctx, [token], n_pos(ctx))
    found = logits, kept(ctx)
    llama.llama_free(ctx)
    return found


def alike(a: list[list[int]], b: list[list[int]]) -> float:
    return float(
        np.mean([len(np.intersect1d(x, y)) / max(len(x), len(y)) for x, y in zip(a, b, strict=True)])
    )


@pytest.mark.parametrize("every_chunk_asks", [True, False], ids=["Llama.eval", "llama-server"])
@pytest.mark.parametrize("n", [41, 511, 512, 513, 520, 900, 1023, 1024, 1025, 1536, 1537, 2100])
def test_a_prompt_in_chunks_is_evicted_once_at_its_end(
    llava: VisionModel, n: int, every_chunk_asks: bool
) -> None:
    """llama_cpp.Llama asks for the last logits of each chunk, llama-server and mtmd for those of the last."""
    evict_by(llava, random_table(llava, 40, 8, n))
    ctx = raw_context(llava, n_ctx=2304, n_batch=N_BATCH)
    assert ctx
    for start in range(0, n, N_BATCH):
        chunk = TOKENS[start : min(start + N_BATCH, n)]
        append(ctx, chunk, start, n_asking=int(every_chunk_asks or start + len(chunk) == n))
    logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(ctx, -1), (300,)).copy()
    if n % N_BATCH or (n > N_BATCH and not every_chunk_asks):
        ended = TOKENS[:n]
        expected, positions = whole(llava, ended, [])
        assert n_evictions(ctx) == 1
        assert alike(kept(ctx), positions) > 0.99
        assert np.linalg.norm(logits - expected) < 1e-2 * np.linalg.norm(expected)
        decode(ctx, [77], n)
        ended, then = TOKENS[:n], [77]
    else:
        # it may go on: the next token ends it
        assert n_evictions(ctx) == 0
        decode(ctx, [77], n)
        ended, then = [*TOKENS[:n], 77], []
    expected, positions = whole(llava, ended, then)
    assert n_evictions(ctx) == 1
    assert alike(kept(ctx), positions) > 0.99
    after = decode(ctx, [78], n + 1)
    assert np.linalg.norm(after - whole(llava, ended, [*then, 78])[0]) < 0.02 * np.linalg.norm(after)
    llama.llama_free(ctx)


def test_a_window_longer_than_the_last_chunk_votes_as_a_whole(llava: VisionModel) -> None:
    n = N_BATCH + 5
    evict_by(llava, random_table(llava, 60, 32, n), 32)
    ctx = raw_context(llava, n_ctx=2304, n_batch=N_BATCH)
    assert ctx
    decode(ctx, TOKENS[:N_BATCH], 0)
    decode(ctx, TOKENS[N_BATCH:n], N_BATCH)
    assert alike(kept(ctx), whole(llava, TOKENS[:n], [])[1]) > 0.99
    llama.llama_free(ctx)


def test_what_has_not_ended_is_not_computed_but_there(llava: VisionModel) -> None:
    evict_by(llava, FORTY)
    ctx, again = raw_context(llava), raw_context(llava)
    assert ctx and again
    append(ctx, TOKENS[:60], 0, n_asking=0)
    append(ctx, TOKENS[60:130], 60, n_asking=0)
    memory = llama.llama_get_memory(ctx)
    stats = library.heads_stats(memory)
    assert stats and (stats.n_pos, stats.n_kept, stats.size_k) == (130, 20 * 130, 0)
    assert n_pos(ctx) == 130 and llama.llama_memory_seq_pos_min(memory, 0) == 0
    # its end can go, be saved, and go on
    assert llama.llama_memory_seq_rm(memory, 0, 100, -1)
    assert llama.llama_memory_seq_rm(memory, 0, 50, -1)
    assert n_pos(ctx) == 50
    assert restored(again, saved(ctx, whole=False), whole=False)
    logits = [decode(each, TOKENS[50:140], 50) for each in (ctx, again)]
    expected = decode(other := raw_context(llava) or 0, TOKENS[:140], 0)
    assert all(np.linalg.norm(each - expected) < 1e-2 * np.linalg.norm(expected) for each in logits)
    assert kept(ctx) == kept(again)
    assert alike(kept(ctx), kept(other)) > 0.99
    for each in (ctx, again, other):
        llama.llama_free(each)


def test_all_logits_of_a_batch_after_what_has_not_ended(llava: VisionModel) -> None:
    """Then everything is computed as it comes, and nothing evicted."""
    evict_by(llava, FORTY)
    ctx = raw_context(llava, n_outputs_max=20)
    assert ctx
    append(ctx, TOKENS[:100], 0, n_asking=0)
    append(ctx, TOKENS[100:120], 100, n_asking=20)
    found = np.ctypeslib.as_array(llama.llama_get_logits(ctx), (20, 300)).copy()
    evict_by(llava, None)
    plain = raw_context(llava, n_outputs_max=20, flash_attn_type=1)
    assert plain
    append(plain, TOKENS[:120], 0, n_asking=20)
    expected = np.ctypeslib.as_array(llama.llama_get_logits(plain), (20, 300))
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)
    assert n_evictions(ctx) == 0 and {len(each) for each in kept(ctx)} == {120}
    llama.llama_free(ctx)
    llama.llama_free(plain)


@pytest.mark.parametrize("n_before", [0, 120], ids=["first prompt", "second prompt"])
@pytest.mark.parametrize("n_nodes", [1, 60, 200, 330])
def test_an_abort_leaves_the_sequence_as_it_was(llava: VisionModel, n_before: int, n_nodes: int) -> None:
    evict_by(llava, FORTY)

    def begun() -> int:
        ctx = raw_context(llava, n_ubatch=64)
        assert ctx
        if n_before:
            decode(ctx, TOKENS[:n_before], 0)
            decode(ctx, [7], n_before)
        return ctx

    ctx, other = begun(), begun()
    start = n_pos(ctx)
    assert start == (n_before + 1 if n_before else 0)
    before = kept(ctx)
    calls = 0

    def abort(_: object) -> bool:
        nonlocal calls
        calls += 1
        return calls >= n_nodes

    callback = llama.ggml_abort_callback(abort)
    llama.llama_set_abort_callback(ctx, callback, None)
    with pytest.raises(AssertionError):
        append(ctx, TOKENS[200:350], start, n_asking=1)
    llama.llama_set_abort_callback(ctx, llama.ggml_abort_callback(), None)
    assert n_pos(ctx) == start and kept(ctx) == before
    logits = [decode(each, TOKENS[200:350], start) for each in (ctx, other)]
    assert np.array_equal(*logits)
    assert kept(ctx) == kept(other)
    llama.llama_free(ctx)
    llama.llama_free(other)


def test_contexts_of_one_model_evict_each_in_its_own_way_in_threads(llava: VisionModel) -> None:
    tables = [
        HeadBudgetTable(FORTY, 8, 7),
        HeadBudgetTable(FORTY + 30, 16, 5, vote="mixkv", residual=True),
        None,
    ]
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = 512
    params.n_threads = params.n_threads_batch = 1

    def run(table: HeadBudgetTable | None) -> tuple[list[np.ndarray], int]:
        ctx = library.new_context(llava.pointer, params, table)
        logits = []
        for turn in range(3):
            logits.append(decode(ctx, TOKENS[turn * 100 : turn * 100 + 99], turn * 100))
            logits.append(decode(ctx, [9], turn * 100 + 99))
        stats = library.heads_stats(llama.llama_get_memory(ctx))
        llama.llama_free(ctx)
        return logits, stats.n_evictions if stats is not None else -1

    alone = [run(table) for table in tables]
    assert [n for _, n in alone] == [3, 3, -1]
    found: dict[int, tuple[list[np.ndarray], int]] = {}
    threads = [
        threading.Thread(target=lambda i=i, t=t: found.__setitem__(i, run(t))) for i, t in enumerate(tables)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (logits, n) in enumerate(alone):
        assert found[i][1] == n
        assert all(map(np.array_equal, found[i][0], logits))
