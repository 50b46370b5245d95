"""A bounded tail: the generated positions that a head holds, and what of them can be taken back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from helpers.agreement import oracle_of, three_turns
from helpers.contexts import FORTY, aborted, append, decode, evict_by, raw_context, restored, saved
from helpers.models import NAMES, test_model
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime import Eviction, VisionModel, generate, library
from sparsemm_edge.runtime.eviction import plan
from sparsemm_edge.runtime.library import llama

TAIL = 12
PROMPT = list(range(10, 110))


@pytest.fixture
def llava() -> Iterator[VisionModel]:
    """40 of the prompt's positions a head, at most TAIL generated ones."""
    with VisionModel.load(test_model("llava").gguf("f16"), n_threads=1) as opened:
        evict_by(opened, FORTY, max_tail=TAIL)
        yield opened


def positions(ctx: int, layer: int = 0, head: int = 0) -> list[int]:
    found: list[int] = library.heads_positions(llama.llama_get_memory(ctx), layer, head).tolist()
    return found


def after_a_long_answer(model: VisionModel, n: int = 3 * TAIL + 5) -> int:
    ctx = raw_context(model)
    assert ctx
    decode(ctx, PROMPT, 0)
    for i in range(n):
        decode(ctx, [20 + i], 100 + i)
    return ctx


@pytest.mark.parametrize("name", NAMES)
def test_the_oldest_generated_positions_go_first_in_every_turn(name: str) -> None:
    """Three turns whose answers are longer than the bound: the oracle drops the same positions, and says the
    same from what is left."""
    files = test_model(name)
    with VisionModel.load(files.gguf("f16"), files.mmproj("f16"), n_threads=1) as model:
        stats = three_turns(model, oracle_of(name), window=8, n_reply=2 * TAIL, max_tail=TAIL)
    assert stats.positions_kept_mean == 48 + TAIL


def test_memory_stops_growing_at_the_bound(llava: VisionModel) -> None:
    ctx = after_a_long_answer(llava, TAIL + 1)
    memory = llama.llama_get_memory(ctx)
    before = library.heads_stats(memory)
    for i in range(200):
        decode(ctx, [20 + i], 101 + TAIL + i)
    after = library.heads_stats(memory)
    assert before and after
    assert (after.size_k, after.size_v) == (before.size_k, before.size_v)
    assert after.n_kept == 20 * (40 + TAIL)
    assert after.n_pos == 301 + TAIL
    # 40 kept, TAIL and one that is about to go, in steps of 16
    assert after.size_k == 20 * 64 * 32 * 2
    llama.llama_free(ctx)


def test_a_prompt_within_all_budgets_is_kept_and_its_answer_bounded(llava: VisionModel) -> None:
    ctx = raw_context(llava)
    assert ctx
    decode(ctx, PROMPT[:30], 0)
    for i in range(3 * TAIL):
        decode(ctx, [20 + i], 30 + i)
    assert positions(ctx) == [*range(30), *range(30 + 2 * TAIL, 30 + 3 * TAIL)]
    stats = library.heads_stats(llama.llama_get_memory(ctx))
    assert stats and stats.n_evictions == 0
    llama.llama_free(ctx)


def test_a_prompt_in_pieces_is_never_dropped_as_if_it_were_an_answer(llava: VisionModel) -> None:
    """Pieces that ask for nothing are part of a prompt: an image between two stretches of text."""
    ctx = after_a_long_answer(llava)
    n = 100 + 3 * TAIL + 5
    held = positions(ctx)
    append(ctx, list(range(30, 80)), n, n_asking=0)
    assert positions(ctx) == [*held, *range(n, n + 50)]
    decode(ctx, [7], n + 50)  # asks: the prompt ends here, and is evicted
    found = positions(ctx)
    assert len(found) == 40 and found[-8:] == list(range(n + 43, n + 51))
    llama.llama_free(ctx)


def test_the_last_token_can_be_taken_back_and_no_more(
    llava: VisionModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = after_a_long_answer(llava)
    memory, last = llama.llama_get_memory(ctx), 100 + 3 * TAIL + 4
    held = positions(ctx)
    assert held[-TAIL:] == list(range(last - TAIL + 1, last + 1))
    expected = decode(ctx, [50], last + 1)

    assert llama.llama_memory_seq_pos_min(memory, 0) == last, "what llama-server rolls back by"
    monkeypatch.setattr(library._log, "show", True)
    for _ in range(2):
        assert not llama.llama_memory_seq_rm(memory, 0, last, -1)
    assert capsys.readouterr().err.count("older positions have been dropped") == 1
    assert llama.llama_memory_seq_rm(memory, 0, last + 1, -1)
    assert positions(ctx) == held
    assert not llama.llama_memory_seq_rm(memory, 0, last, -1), "the one before needs what is gone"
    assert np.array_equal(decode(ctx, [50], last + 1), expected)
    llama.llama_free(ctx)


def test_before_anything_was_lost_all_of_an_answer_can_be_taken_back(llava: VisionModel) -> None:
    ctx = after_a_long_answer(llava, TAIL + 1)  # the first token is masked, and still there
    memory = llama.llama_get_memory(ctx)
    assert positions(ctx)[-TAIL:] == list(range(101, 101 + TAIL))
    assert llama.llama_memory_seq_rm(memory, 0, 104, -1)
    assert positions(ctx)[-4:] == list(range(100, 104))
    again = after_a_long_answer(llava, 4)
    assert np.array_equal(decode(ctx, [60], 104), decode(again, [60], 104))
    llama.llama_free(ctx)
    llama.llama_free(again)


def test_an_aborted_token_leaves_the_tail_as_it_was(llava: VisionModel) -> None:
    ctx, again = after_a_long_answer(llava), after_a_long_answer(llava)
    first = 100 + 3 * TAIL + 5
    assert aborted(ctx, [50], first, 3)
    for i, token in enumerate((50, 51, 52)):
        assert np.array_equal(decode(ctx, [token], first + i), decode(again, [token], first + i))
    assert positions(ctx) == positions(again)
    llama.llama_free(ctx)
    llama.llama_free(again)


def test_a_state_carries_the_tail_and_wants_the_same_bound(llava: VisionModel) -> None:
    ctx, again = after_a_long_answer(llava), raw_context(llava)
    assert again
    state, first = saved(ctx, True), 100 + 3 * TAIL + 5
    assert restored(again, state, True)
    assert positions(again) == positions(ctx)
    for step, tokens in enumerate(([50], list(range(60, 80)), [51])):
        at = first + (0, 1, 21)[step]
        assert np.array_equal(decode(ctx, tokens, at), decode(again, tokens, at))
    for bound in (0, TAIL + 1):
        evict_by(llava, FORTY, max_tail=bound)
        other = raw_context(llava)
        assert other
        assert not restored(other, state, True)
        llama.llama_free(other)
    llama.llama_free(ctx)
    llama.llama_free(again)


def test_several_tokens_at_once_are_dropped_for_one_by_one(llava: VisionModel) -> None:
    """A batch with several outputs, as a speculative check makes it."""
    ctx, again = after_a_long_answer(llava), after_a_long_answer(llava)
    first = 100 + 3 * TAIL + 5
    append(ctx, list(range(60, 65)), first, n_asking=5)
    for i in range(5):
        logits = decode(again, [60 + i], first + i)
        found = np.ctypeslib.as_array(llama.llama_get_logits_ith(ctx, i), (300,))
        assert np.array_equal(found, logits)
    assert positions(ctx) == positions(again)
    llama.llama_free(ctx)
    llama.llama_free(again)


def test_a_first_batch_of_outputs_is_no_answer_and_its_state_goes_on(llava: VisionModel) -> None:
    """Embeddings, or --logits_all: no prompt has ended, so nothing is bounded or dropped yet."""
    ctx, again = raw_context(llava), raw_context(llava)
    assert ctx and again
    append(ctx, PROMPT, 0, n_asking=len(PROMPT))
    append(ctx, [20], 100, n_asking=1)
    assert positions(ctx) == list(range(101))
    assert restored(again, saved(ctx, whole=False), whole=False)
    assert np.array_equal(decode(again, [21], 101), decode(ctx, [21], 101))
    llama.llama_free(ctx)
    llama.llama_free(again)


def test_a_bound_below_the_window_is_refused(llava: VisionModel) -> None:
    evict_by(llava, FORTY, max_tail=7)
    assert raw_context(llava) is None
    assert "at most 7 generated positions are held, less than the window of 8" in str(library.failure("no"))
    wanted: Any = dict(metadata=None, shape=llava.shape, n_prompt=200, model=llava.path)
    with pytest.raises(
        SparseMMError, match="--kv-max-tail is 31: it must be at least the observation window, 32"
    ):
        plan(Eviction(policy="uniform", budget=64, window=32, max_tail=31), **wanted)
    with pytest.raises(SparseMMError, match="--kv-max-tail needs a cache that evicts"):
        plan(Eviction(enabled=False, max_tail=64), **wanted)


def test_generate_holds_no_more_of_its_answer_than_it_may(llava: VisionModel) -> None:
    eviction = Eviction(policy="uniform", budget=24, window=8, max_tail=10)
    answer = generate(llava, "Hello there, you. " * 4, n_predict=40, eviction=eviction)
    text, stats = "".join(answer), answer.stats()
    assert text and stats.n_generated > 12
    assert stats.kv.positions_kept_mean == 23 + 10  # and the residual slot
