"""What a context survives: odd sequence operations, failed allocations, many prompts, being opened anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from helpers.contexts import FORTY, decode, evict_by, raw_context
from helpers.model_files import random_scores
from helpers.models import test_model
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.convert import convert
from sparsemm_edge.runtime import VisionModel, library
from sparsemm_edge.runtime.library import llama

PROMPT = list(range(10, 110))


@pytest.fixture(scope="module")
def llava() -> Iterator[VisionModel]:
    with VisionModel.load(test_model("llava").gguf("f16"), n_threads=1) as opened:
        evict_by(opened, FORTY)
        yield opened


# --- sequence operations


def test_what_needs_several_sequences_or_a_shift_is_not_done_and_said_once(
    llava: VisionModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, plain = raw_context(llava), raw_context(llava)
    assert ctx and plain
    for c in (ctx, plain):
        decode(c, PROMPT, 0)
        decode(c, [20], 100)
    memory = llama.llama_get_memory(ctx)
    monkeypatch.setattr(library._log, "show", True)
    llama.llama_memory_seq_keep(memory, 0)  # these two ask for what is so already
    llama.llama_memory_seq_cp(memory, 0, 0, -1, -1)
    assert capsys.readouterr().err == ""
    assert not llama.llama_memory_can_shift(memory)
    for _ in range(2):
        llama.llama_memory_seq_add(memory, 0, 50, -1, -10)
        llama.llama_memory_seq_div(memory, 0, 50, -1, 2)
        llama.llama_memory_seq_cp(memory, 0, 1, -1, -1)
        assert not llama.llama_memory_seq_rm(memory, 0, 50, 60)
        assert not llama.llama_memory_seq_rm(memory, 0, 50, -1)
    err = capsys.readouterr().err
    assert err.count("not done, the KV cache evicts per head") == 1
    assert err.count("cannot remove positions") == 1
    assert llama.llama_memory_seq_pos_max(memory, 0) == 100
    assert np.array_equal(decode(ctx, [21], 101), decode(plain, [21], 101)), "nothing has changed"
    llama.llama_memory_seq_keep(memory, 1)  # there is nothing of another sequence
    assert llama.llama_memory_seq_pos_max(memory, 0) == -1
    llama.llama_free(ctx)
    llama.llama_free(plain)


def test_the_smallest_position_is_what_a_sequence_can_be_cut_to(llava: VisionModel) -> None:
    """llama-server removes everything after it to reuse a prefix, and starts anew if it lies too high."""
    ctx = raw_context(llava)
    assert ctx
    memory = llama.llama_get_memory(ctx)
    decode(ctx, PROMPT[:30], 0)
    assert llama.llama_memory_seq_pos_min(memory, 0) == 0, "not evicted: it can be cut anywhere"
    decode(ctx, PROMPT[30:], 30)
    decode(ctx, [20], 100)
    lowest = llama.llama_memory_seq_pos_min(memory, 0)
    assert lowest == 99
    assert not llama.llama_memory_seq_rm(memory, 0, lowest, -1)
    assert llama.llama_memory_seq_rm(memory, 0, lowest + 1, -1)
    llama.llama_free(ctx)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_llama_cpp_python_reuses_a_prefix_or_reads_the_prompt_again(tmp_path: Path) -> None:
    """`Llama.generate` keeps what a new prompt shares with the last one: all of it and the answer, as in a
    chat, or a part of it, which the heads do not hold any more."""
    import llama_cpp

    library.require_patched()
    source = test_model("llava").gguf("f16")
    file = convert(
        source, random_scores(source, tmp_path), tmp_path / "m.gguf", spec=BudgetSpec(budget=40, window=8)
    ).path

    def opened() -> Any:
        return llama_cpp.Llama(str(file), n_ctx=1024, n_batch=1024, n_threads=1, verbose=False)

    def answer(model: Any, prompt: list[int]) -> list[int]:
        found: list[int] = []
        for token in model.generate(prompt, temp=0.0):
            found.append(int(token))
            if len(found) == 8:
                return found
        return found

    model = opened()
    first = answer(model, PROMPT)
    evictions = library.heads_stats(llama.llama_get_memory(model.ctx))
    # the next turn goes on: as in a context in which it was appended
    longer = [*PROMPT, *first[:-1], *range(150, 200)]
    answer(model, longer)
    stats = library.heads_stats(llama.llama_get_memory(model.ctx))
    assert evictions and stats
    assert (evictions.n_evictions, stats.n_evictions) == (1, 2)
    # half of the first prompt, then others: as in a fresh context
    other = [*PROMPT[:50], *range(200, 260)]
    assert answer(model, other) == answer(opened(), other)
    # and the first prompt again
    assert answer(model, PROMPT) == first


# --- batches that a caller makes wrongly


@pytest.mark.parametrize(
    "positions",
    [[100, 102], [101, 102], [99, 100], [100, 99], [-1, 0]],
    ids=["a gap", "after a gap", "held already", "backwards", "below 0"],
)
def test_positions_that_do_not_follow_are_an_error_and_the_sequence_goes_on(
    llava: VisionModel, positions: list[int]
) -> None:
    ctx = raw_context(llava)
    assert ctx
    decode(ctx, PROMPT, 0)
    batch = llama.llama_batch_init(2, 0, 1)
    batch.n_tokens = 2
    for i, position in enumerate(positions):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = 20 + i, position, 1
        batch.seq_id[i][0], batch.logits[i] = 0, i == 1
    assert llama.llama_decode(ctx, batch) != 0
    llama.llama_batch_free(batch)
    went_on = decode(ctx, [20], 100)
    llama.llama_free(ctx)

    ctx = raw_context(llava)
    assert ctx
    decode(ctx, PROMPT, 0)
    assert np.array_equal(decode(ctx, [20], 100), went_on)
    llama.llama_free(ctx)


# --- failed allocations

# posix_memalign is what ggml takes the memory of tensors from, and Python does not use it. Small
# pieces are for lists of tensors, without which ggml aborts.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>

static long left = -1;
static int  n_failed;

void fail_after(long n) { left = n; n_failed = 0; }
int  failures(void) { left = -1; return n_failed; }

int posix_memalign(void ** p, size_t align, size_t size) {
    static int (*real)(void **, size_t, size_t);
    if (!real) { real = dlsym(RTLD_NEXT, "posix_memalign"); }
    if (size >= 8192 && left >= 0 && left-- == 0) { n_failed++; return ENOMEM; }
    return real(p, align, size);
}
"""

CHILD = r"""
import ctypes, json, sys
import numpy as np
from sparsemm_edge.runtime import VisionModel, library
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.library import llama

shim = ctypes.CDLL(None)

def raw_context(model):
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = 1024
    params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    table = HeadBudgetTable(np.full((5, 4), 40, np.uint32), 8, 7, vote="mixkv", residual=True)
    return library.new_context(model.pointer, params, table)

def decode(ctx, tokens, first):
    "status and logits"
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
    status = llama.llama_decode(ctx, batch)
    llama.llama_batch_free(batch)
    if status:
        return status, None
    return 0, np.ctypeslib.as_array(llama.llama_get_logits_ith(ctx, -1), (300,)).copy()

report = {}
with VisionModel.load(sys.argv[1], n_threads=1) as model:
    first = [(list(range(10, 110)), 0)]
    steps = {
        "the first prompt": ([], first[0]),
        "a prompt in several batches": ([], (list(range(10, 250)) * 3, 0)),
        "a later prompt": (first, (list(range(40, 60)), 100)),
        "a token that makes the store grow": (first + [([20 + i], 100 + i) for i in range(48)], ([99], 148)),
    }
    for name, (before, step) in steps.items():
        def prepared():
            ctx = raw_context(model)
            for tokens, at in before:
                assert decode(ctx, tokens, at)[0] == 0
            return ctx
        ctx = prepared()
        wanted = [decode(ctx, *step)[1], decode(ctx, [7], step[1] + len(step[0]))[1]]
        llama.llama_free(ctx)
        report[name] = 0
        for n in range(1000):
            ctx = prepared()
            shim.fail_after(n)
            status, logits = decode(ctx, *step)
            if not shim.failures():
                assert status == 0 and np.array_equal(logits, wanted[0])
                llama.llama_free(ctx)
                break
            if status == 0:  # it was not needed, or it was tried again
                assert np.array_equal(logits, wanted[0])
            else:
                report[name] += 1
                n_pos = llama.llama_memory_seq_pos_max(llama.llama_get_memory(ctx), 0) + 1
                if n_pos < step[1]:  # what was there is lost, and the cache says so
                    for tokens, at in [*before, step]:
                        status, logits = decode(ctx, tokens, at)
                        assert status == 0
                else:
                    status, logits = decode(ctx, step[0][n_pos - step[1]:], n_pos)
                    assert status == 0, status
                assert np.allclose(logits, wanted[0], atol=1e-2), "the answer"
            status, logits = decode(ctx, [7], step[1] + len(step[0]))
            assert status == 0 and np.allclose(logits, wanted[1], atol=1e-2), "the token after it"
            llama.llama_free(ctx)
        else:
            raise AssertionError("it always fails")

    # a state that cannot be restored leaves an empty sequence, and can be restored later
    ctx = raw_context(model)
    assert decode(ctx, *first[0])[0] == 0
    size = llama.llama_state_seq_get_size(ctx, 0)
    state = (ctypes.c_uint8 * size)()
    assert llama.llama_state_seq_get_data(ctx, state, size, 0) == size
    wanted = decode(ctx, [7], 100)[1]
    llama.llama_free(ctx)
    report["restoring a state"] = 0
    for n in range(1000):
        ctx = raw_context(model)
        shim.fail_after(n)
        n_read = llama.llama_state_seq_set_data(ctx, state, size, 0)
        if not shim.failures():
            break
        if n_read != size:
            report["restoring a state"] += 1
            assert n_read == 0
            assert llama.llama_memory_seq_pos_max(llama.llama_get_memory(ctx), 0) == -1
            assert llama.llama_state_seq_set_data(ctx, state, size, 0) == size
        assert np.array_equal(decode(ctx, [7], 100)[1], wanted)
        llama.llama_free(ctx)
    llama.llama_free(ctx)
print(json.dumps(report))
"""


def test_a_failed_allocation_leaves_a_context_that_answers(tmp_path: Path) -> None:
    """Every allocation of a prompt, a later prompt, a growing step and a restored state fails once."""
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c", "-ldl"], check=True)
    preload = " ".join(filter(None, (str(shim), os.environ.get("LD_PRELOAD"))))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(test_model("llava").gguf("f16"))],
        env={**os.environ, "LD_PRELOAD": preload},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert len(report) == 5
    assert all(n > 0 for n in report.values()), report


# --- memory over time


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_two_hundred_prompts_take_no_more_memory_than_twenty(llava: VisionModel) -> None:
    """In one context: a prompt, a later prompt that evicts again, an answer that makes the store grow."""
    ctx = raw_context(llava)
    assert ctx
    memory = llama.llama_get_memory(ctx)
    after = []
    for i in range(200):
        llama.llama_memory_clear(memory, True)
        decode(ctx, PROMPT[i % 7 :], 0)
        for k in range(60):
            decode(ctx, [20 + k], 100 - i % 7 + k)
        decode(ctx, PROMPT[:30], 160 - i % 7)
        after.append(resident())
    llama.llama_free(ctx)
    assert after[-1] <= 1.02 * after[20]


def test_fifty_contexts_and_models_opened_and_closed_leave_nothing(llava: VisionModel) -> None:
    after = []
    for _ in range(50):
        with VisionModel.load(llava.path, n_threads=1) as model:
            evict_by(model, FORTY)
            ctx = raw_context(model)
            assert ctx
            decode(ctx, PROMPT, 0)
            decode(ctx, [20], 100)
            llama.llama_free(ctx)
        after.append(resident())
    assert after[-1] <= 1.02 * after[10]
