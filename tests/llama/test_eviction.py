"""The patched llama.cpp evicts as DESIGN section 3 says: against the PyTorch oracle, and against itself."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

from helpers.agreement import (
    TEXT,
    TURNS,
    ask,
    keeps_alike,
    oracle_of,
    relative_error,
    slots_alike,
    three_turns,
)
from helpers.contexts import (
    FORTY,
    aborted,
    append,
    context_of,
    decode,
    evict_by,
    random_table,
    raw_context,
    restored,
    saved,
    slots_of,
)
from helpers.models import NAMES, test_model
from helpers.oracle import Agreement, Oracle, leads
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime import VisionModel, library
from sparsemm_edge.runtime.encode import EncodedPrompt, encode
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.library import llama
from sparsemm_edge.runtime.prompt import Prompt

GROWTH_STEP = 64  # rows of room per head, at most: llama-kv-cache-heads.cpp


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> Iterator[VisionModel]:
    files = test_model(request.param)
    with VisionModel.load(files.gguf("f16"), files.mmproj("f16"), n_threads=1) as opened:
        yield opened


@pytest.fixture
def oracle(model: VisionModel) -> Oracle:
    return oracle_of(model.path.parent.name)


@dataclass(frozen=True)
class Answer:
    """tokens [n_predict], logits [n_predict, n_vocab], kept[layer][head]: the prompt's kept positions,
    slots[layer][head]: the residual slots."""

    tokens: list[int]
    logits: np.ndarray
    kept: list[list[np.ndarray]]
    stats: library.HeadsStats | None
    slots: list[list[Any]]


def answer(
    model: VisionModel,
    prompt: Prompt,
    table: np.ndarray | None,
    window: int = 8,
    *,
    n_predict: int = 32,
    force: list[int] | None = None,
    vote: str = "snapkv",
    residual: bool = False,
    **options: Any,
) -> Answer:
    """Read a prompt, evict by a table of head budgets (None: the plain cache), decode greedily."""
    evict_by(model, table, window, vote=vote, residual=residual)
    with context_of(model, n_ctx=prompt.n_tokens + n_predict, **options) as context:
        context.prefill(encode(model, prompt))
        kept = [] if table is None else context.kept()
        slots = [] if table is None else slots_of(context)
        tokens: list[int] = []
        logits = []
        for i in range(n_predict):
            logits.append(context.logits())
            tokens.append(int(logits[-1].argmax()) if force is None else force[i])
            context.decode(tokens[-1])
        stats = library.heads_stats(llama.llama_get_memory(context.pointer))
        return Answer(tokens, np.array(logits), kept, stats, slots)


# --- the oracle


WAYS = [("snapkv", False), ("snapkv", True), ("mixkv", False), ("mixkv", True)]


@pytest.mark.parametrize(("vote", "residual"), WAYS)
@pytest.mark.parametrize("n_ubatch", [None, 64])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_heads_keep_what_the_oracle_keeps_and_answer_alike(
    model: VisionModel, oracle: Oracle, kind: str, n_ubatch: int | None, vote: str, residual: bool
) -> None:
    text, images = ask(model.path.parent.name, kind)
    way: dict[str, Any] = {"vote": vote, "residual": residual}
    agreements = []
    for budget, window in ((24, 8), (48, 8), (96, 8), (48, 32), (96, 32)):
        with model.tokenize(text, images) as prompt:
            table = random_table(
                model, budget, window, prompt.n_tokens, seed=budget + window, residual=residual
            )
            found = answer(model, prompt, table, window, n_ubatch=n_ubatch, **way)
        agreements.append(agree_with_oracle(oracle, found, text, images, table, window, **way))
    assert sum(a.n_same for a in agreements) >= 0.99 * sum(a.n_kept for a in agreements)


def test_a_prompt_whose_ffn_is_computed_in_parts_is_evicted_as_the_oracle_does(
    model: VisionModel, oracle: Oracle
) -> None:
    """Batches of more than 512 rows are halved for the FFN, twice here; an odd number, so not into equals."""
    text = oracle.chat(TEXT * 16)
    with model.tokenize(text) as prompt:
        text += " no" * (1 - prompt.n_tokens % 2)
    with model.tokenize(text) as prompt:
        assert prompt.n_tokens > 1024 and prompt.n_tokens % 2
        table = random_table(model, 96, 8, prompt.n_tokens)
        found = answer(model, prompt, table)
    agree_with_oracle(oracle, found, text, [], table, 8)


@pytest.mark.parametrize("n_last", [1, 3, 40])
@pytest.mark.parametrize("n_ubatch", [None, 64])
def test_the_window_votes_as_a_whole_however_the_prompt_is_cut(
    model: VisionModel, oracle: Oracle, n_ubatch: int | None, n_last: int
) -> None:
    """In three calls, of which only the last one asks for logits."""
    window = 16
    text, _ = ask(model.path.parent.name, "text")
    with model.tokenize(text) as prompt:
        tokens = prompt.parts[0].tokens
        table = random_table(model, 40, window, len(tokens))
        evict_by(model, table, window)
        with context_of(model, n_ctx=len(tokens) + 8, n_ubatch=n_ubatch) as context:
            before, rest = encode(model, prompt).split(50)
            parts = (before, *rest.split(len(tokens) - 50 - n_last))
            context.prefill(EncodedPrompt(tuple(batch for part in parts for batch in part.batches)))
            kept = context.kept()
    keeps_alike(oracle.run(oracle.prompt(text), table, window, 1), kept)


@pytest.mark.parametrize(("vote", "residual"), WAYS)
@pytest.mark.parametrize("window", [8, 32])
def test_a_later_prompt_evicts_again_among_what_a_head_holds(
    model: VisionModel, oracle: Oracle, window: int, vote: str, residual: bool
) -> None:
    """Three turns with 20 generated tokens between them; each turn ends in an eviction."""
    stats = three_turns(model, oracle, window, n_reply=20, vote=vote, residual=residual)
    assert stats.n_evictions == 3


@pytest.mark.parametrize(("vote", "residual"), [WAYS[0], WAYS[3]])
def test_a_sequence_can_be_cut_back_into_the_window_and_no_further(
    model: VisionModel, oracle: Oracle, vote: str, residual: bool
) -> None:
    """Cut, told something else, cut after that, told again: the heads hold and say what the oracle's do."""
    text, images = ask(model.path.parent.name, "image")
    ids = oracle.tokenizer.encode(TURNS[0], add_special_tokens=False)
    window = 8
    with model.tokenize(text, images) as prompt:
        table = random_table(model, 48, window, prompt.n_tokens, residual=residual)
        evict_by(model, table, window, 0, vote, residual)
        talk = oracle.conversation(window, vote=vote, residual=residual)
        expected = talk.read(oracle.prompt(text, images), table)
        with context_of(model, n_ctx=prompt.n_tokens + 128) as context:
            context.prefill(encode(model, prompt))
            talk.keep(context.kept())
            n, n_past = context.n_tokens, context.n_past
            assert len(expected.kept[0][0]) < n

            def cut(n_left: int) -> bool:
                return context.truncate(n_past - (n - n_left), n_left)

            for n_left in (n - 3, n - window):
                context.decode(ids[0])
                assert cut(n_left)
                talk.truncate(n_left)
                for token in ids[:6]:
                    context.decode(token)
                    talk.say(token)
                assert relative_error(context.logits()[None], talk.logits[None]) < 1e-2
                for heads, expected_heads in zip(context.kept(), talk.held, strict=True):
                    assert all(map(np.array_equal, heads, expected_heads))
            slots_alike(oracle, slots_of(context), talk.slots)

            held, state = context.kept(), context.state()
            assert not cut(n - window - 1), "some head lost what would become the end"
            assert not cut(0)
            for heads, before in zip(context.kept(), held, strict=True):
                assert all(map(np.array_equal, heads, before))

            context.restore(state)
            assert cut(n - window + 2) and not cut(n - window - 1)


def test_a_state_of_before_the_slots_is_refused_in_one_line(llava: VisionModel) -> None:
    with llava.tokenize(ask("llava", "text")[0]) as prompt:
        evict_by(llava, FORTY, 8, 0, "mixkv", True)
        with context_of(llava, n_ctx=prompt.n_tokens + 8) as context:
            context.prefill(encode(llava, prompt))
            kept, state = context.kept(), context.state()
            assert state.data.tobytes().count(b"hed4") == 1
            old = np.frombuffer(state.data.tobytes().replace(b"hed4", b"hed3"), np.uint8)
            library.forget_errors()
            assert not restored(context.pointer, old.tobytes(), whole=False)
            refusal = str(library.failure("refused"))
            assert "was saved by an older version" in refusal and "\n" not in refusal
            for heads, before in zip(context.kept(), kept, strict=True):
                assert all(map(np.array_equal, heads, before))


@pytest.mark.parametrize(
    ("cache_type", "tolerance"), [("f16", 1e-2), ("f32", 1e-2), ("bf16", 4e-2), ("q8_0", 8e-2), ("q4_0", 0.3)]
)
def test_every_cache_type_computes_what_the_oracle_computes_from_the_same_positions(
    model: VisionModel, oracle: Oracle, cache_type: str, tolerance: float
) -> None:
    """100 steps, so that the cache has grown twice."""
    text, images = ask(model.path.parent.name, "image")
    with model.tokenize(text, images) as prompt:
        table = random_table(model, 40, 8, prompt.n_tokens)
        found = answer(
            model, prompt, table, 8, n_predict=100, cache_type_k=cache_type, cache_type_v=cache_type
        )
    expected = oracle.run(oracle.prompt(text, images), table, 8, 100, kept=found.kept, force=found.tokens)
    assert relative_error(found.logits, expected.logits) < tolerance


def agree_with_oracle(
    oracle: Oracle,
    found: Answer,
    text: str,
    images: list[Any],
    table: np.ndarray,
    window: int,
    n_vote: int | None = None,
    **way: Any,
) -> Agreement:
    """What was kept and said is what the oracle keeps and says."""
    prompt = oracle.prompt(text, images)
    agreement = keeps_alike(oracle.run(prompt, table, window, 1, n_vote=n_vote, **way), found.kept)
    # from the positions that llama.cpp kept, its greedy tokens are the oracle's but for ties
    forced = oracle.run(
        prompt,
        table,
        window,
        len(found.tokens),
        n_vote=n_vote,
        kept=found.kept,
        force=found.tokens,
        **way,
    )
    slots_alike(oracle, found.slots, forced.slots)
    assert relative_error(found.logits, forced.logits) < 1e-2
    assert leads(forced, found.tokens).max() < 2e-2
    return agreement


# --- no eviction, no change


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("n_ubatch", [None, 64])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_budgets_over_the_prompt_change_nothing(
    model: VisionModel, kind: str, n_ubatch: int | None, cache_type: str
) -> None:
    text, images = ask(model.path.parent.name, kind)
    options = {"n_ubatch": n_ubatch, "cache_type_k": cache_type, "cache_type_v": cache_type}
    with model.tokenize(text, images) as prompt:
        table = np.full((model.shape.n_layer, model.shape.n_head_kv), prompt.n_tokens, np.uint32)
        stock = answer(model, prompt, None, n_predict=64, **options)
        found = answer(model, prompt, table, n_predict=64, **options)
    assert found.stats is not None and found.stats.n_evictions == 0
    assert found.tokens == stock.tokens
    assert relative_error(found.logits, stock.logits) < 2e-3


def test_a_prompt_that_is_not_evicted_goes_on_in_a_cache_that_grows(model: VisionModel) -> None:
    """The cache of a short prompt is made for 256 positions, and moves when the answer needs more."""
    text, images = ask(model.path.parent.name, "image")
    with model.tokenize(text, images) as prompt:
        table = np.full((model.shape.n_layer, model.shape.n_head_kv), 2000, np.uint32)
        n_predict = 320 - prompt.n_tokens % 256
        stock = answer(model, prompt, None, n_predict=n_predict)
        found = answer(model, prompt, table, n_predict=n_predict)
    assert found.stats is not None and found.stats.n_pos > (prompt.n_tokens + 255) // 256 * 256
    assert found.tokens == stock.tokens
    assert relative_error(found.logits, stock.logits) < 2e-3


def test_losing_one_position_in_one_head_leaves_the_rest_as_it_was(model: VisionModel) -> None:
    """The path after an eviction, with almost everything kept, is close to the plain cache; a head with a
    budget over the prompt keeps every position."""
    text, images = ask(model.path.parent.name, "image")
    with model.tokenize(text, images) as prompt:
        n = prompt.n_tokens
        table = np.full((model.shape.n_layer, model.shape.n_head_kv), n + 100, np.uint32)
        table[-1, -1] = n - 1
        stock = answer(model, prompt, None)
        found = answer(model, prompt, table, force=stock.tokens)
    assert found.stats is not None and found.stats.n_evictions == 1
    lengths = np.array([[len(head) for head in heads] for heads in found.kept])
    assert (lengths == np.minimum(table, n)).all()
    # the last layer's last head gave its weakest position away, all else is equal
    assert relative_error(found.logits, stock.logits) < 5e-2


# --- memory


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_bytes_are_the_kept_positions_and_a_little_room(model: VisionModel, cache_type: str) -> None:
    shape = model.shape
    text, images = ask(model.path.parent.name, "image")
    with model.tokenize(text, images) as prompt:
        table = random_table(model, 48, 8, prompt.n_tokens)
        stats = answer(
            model, prompt, table, n_predict=1, cache_type_k=cache_type, cache_type_v=cache_type
        ).stats
        assert stats is not None
        row = stats.size_full / (shape.n_layer * shape.n_head_kv * stats.n_pos)  # K and V of one position
        assert stats.n_pos == prompt.n_tokens + 1
        assert stats.n_kept == table.sum() + table.size
        kept = int(table.sum()) * row
        room = GROWTH_STEP * table.size * row
        assert kept <= stats.size_k + stats.size_v <= 1.15 * kept + room
        # while the prompt was read: one layer of it (in steps of 64 cells), and what was kept
        one_layer = (prompt.n_tokens + 63) // 64 * 64 * shape.n_head_kv * row
        assert stats.size_k_peak + stats.size_v_peak <= one_layer + 1.15 * kept + room


def test_no_memory_of_the_size_of_the_context_is_touched() -> None:
    files = test_model("llava")
    n_ctx = 65536
    with VisionModel.load(files.gguf("f16"), files.mmproj("f16"), n_threads=1) as model:
        text, images = ask("llava", "image")
        with model.tokenize(text, images) as prompt:
            table = random_table(model, 48, 8, prompt.n_tokens)
            before = psutil.Process().memory_info().rss
            evict_by(model, table)
            with context_of(model, n_ctx=n_ctx) as context:
                context.prefill(encode(model, prompt))
                context.decode(5)
                grown = psutil.Process().memory_info().rss - before
                stats = context.kv_stats()
    full = n_ctx * stats.bytes_full // (prompt.n_tokens + 1)
    assert stats.bytes_peak < full // 100
    assert grown < full // 4


# --- what is refused, and what a context survives


@pytest.fixture
def llava() -> Iterator[VisionModel]:
    files = test_model("llava")
    with VisionModel.load(files.gguf("f16"), n_threads=1) as opened:
        evict_by(opened, FORTY)
        yield opened


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"n_seq_max": 2}, "supports one sequence and n_seq_max is 2: set it to 1"),
        ({"type_k": 3, "type_v": 3}, "the KV cache type q4_1 is not supported"),
        ({"attention_type": 1}, "the attention is not causal"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(
    llava: VisionModel, changes: dict[str, int], line: str
) -> None:
    assert raw_context(llava, **changes) is None
    message = str(library.failure("no context"))
    assert line in message
    # the same context without eviction is fine
    evict_by(llava, None)
    found = raw_context(llava, **changes, **({"flash_attn_type": 1} if "type_v" in changes else {}))
    assert found
    llama.llama_free(found)


def tiny_gemma3(path: Path, sliding_window: int, head_budgets: list[int]) -> Path:
    """A Gemma 3 of one layer and one head with `sparsemm.*` keys: with a window it attends in windows."""
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_token_scores([0.0] * 259)
    writer.add_uint32("sparsemm.version", 1)
    writer.add_uint32("sparsemm.window", 8)
    writer.add_uint32("sparsemm.pool_kernel", 7)
    writer.add_key_value(
        "sparsemm.head_budgets", head_budgets, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
    )
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    vectors = ("attn_norm", "post_attention_norm", "attn_k_norm", "attn_q_norm", "ffn_norm", "post_ffw_norm")
    writer.add_tensor("token_embd.weight", np.ones((259, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for name in matrices:
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((32, 32), np.float32))
    for name in vectors:
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("sliding_window", "head_budgets", "evicts", "context_made"),
    [
        (0, [40], True, True),
        (16, [40], False, True),  # its only layer has a window, so there is none to evict in
        (0, [40, 40], False, True),  # a table that does not fit is dropped, the model still loads
        (0, [7], False, True),
    ],
)
def test_metadata_decides_whether_a_context_evicts(
    tmp_path: Path, sliding_window: int, head_budgets: list[int], evicts: bool, context_made: bool
) -> None:
    library.require_patched()
    library.start(show_log=False)
    path = tiny_gemma3(tmp_path / "gemma3.gguf", sliding_window, head_budgets)
    pointer = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert pointer
    assert llama._lib.llama_model_head_params(pointer).enabled == evicts
    params = llama.llama_context_default_params()
    params.n_ctx = 256
    library.forget_errors()
    ctx = llama.llama_init_from_model(pointer, params)
    assert bool(ctx) == context_made
    if ctx:
        assert (library.heads_stats(llama.llama_get_memory(ctx)) is not None) == evicts
        llama.llama_free(ctx)
    else:
        assert "the model uses sliding window attention (SWA)" in str(library.failure("no context"))
    llama.llama_model_free(pointer)


@pytest.mark.parametrize(
    ("table", "window", "pool_kernel", "line"),
    [
        (np.full((5, 3), 40), 8, 7, "15 head budgets, expected 5 layers x 4 KV heads"),
        (np.full((5, 4), 7), 8, 7, "the budget of layer 0, KV head 0 is 7, less than the window of 8"),
        (np.full((5, 4), 40), 0, 7, "the window is 0"),
        (np.full((5, 4), 40), 8, 6, "the pooling kernel is 6, expected an odd number"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_one_line(
    llava: VisionModel, table: np.ndarray, window: int, pool_kernel: int, line: str
) -> None:
    with pytest.raises(SparseMMError, match=line):
        library.new_context(
            llava.pointer,
            llama.llama_context_default_params(),
            HeadBudgetTable(table.astype(np.uint32), window, pool_kernel),
        )


def test_only_what_no_head_has_evicted_can_be_removed(llava: VisionModel) -> None:
    ctx = raw_context(llava)
    assert ctx
    memory = llama.llama_get_memory(ctx)
    prompt = list(range(10, 110))
    decode(ctx, prompt, 0)
    first = decode(ctx, [20], 100)
    decode(ctx, [21], 101)

    assert not llama.llama_memory_can_shift(memory)
    assert llama.llama_memory_seq_pos_max(memory, 0) == 101
    assert not llama.llama_memory_seq_rm(memory, 0, 50, 60)
    assert not llama.llama_memory_seq_rm(memory, 0, 99, -1)
    assert llama.llama_memory_seq_pos_max(memory, 0) == 101, "a refusal changes nothing"

    # what was appended after the eviction can go, and come back
    assert llama.llama_memory_seq_rm(memory, 0, 100, -1)
    assert llama.llama_memory_seq_pos_max(memory, 0) == 99
    assert np.array_equal(decode(ctx, [20], 100), first)

    # and all of it, for the next prompt
    assert llama.llama_memory_seq_rm(memory, 0, -1, -1)
    assert llama.llama_memory_seq_pos_max(memory, 0) == -1
    decode(ctx, prompt, 0)
    assert np.array_equal(decode(ctx, [20], 100), first)
    stats = library.heads_stats(memory)
    assert stats is not None and stats.n_evictions == 2
    llama.llama_free(ctx)


@pytest.mark.parametrize("after", [0, 3, 40, 100])
def test_a_prompt_that_is_aborted_leaves_a_context_that_reads_it_again(
    llava: VisionModel, after: int
) -> None:
    """The first prompt, and a later one that evicts from what the heads hold."""
    ctx = raw_context(llava)
    assert ctx
    first, second = list(range(10, 110)), list(range(40, 60))
    memory = llama.llama_get_memory(ctx)
    decode(ctx, first, 0)
    expected = [decode(ctx, [20], 100), decode(ctx, second, 101), decode(ctx, [21], 121)]

    llama.llama_memory_clear(memory, True)
    assert aborted(ctx, first, 0, after)
    assert llama.llama_memory_seq_pos_max(memory, 0) == -1
    decode(ctx, first, 0)
    found = [decode(ctx, [20], 100)]
    assert aborted(ctx, second, 101, after)
    assert llama.llama_memory_seq_pos_max(memory, 0) == 100
    found += [decode(ctx, second, 101), decode(ctx, [21], 121)]
    assert np.array_equal(found, expected)
    llama.llama_free(ctx)


# --- state


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("n_prompt", [100, 30])  # evicted, and shorter than every budget
def test_a_state_goes_on_as_if_nothing_had_been_between(
    llava: VisionModel, n_prompt: int, whole: bool
) -> None:
    ctx, again = raw_context(llava), raw_context(llava)
    assert ctx and again
    decode(ctx, list(range(10, 10 + n_prompt)), 0)
    for i in range(60):  # the head store has grown
        decode(ctx, [20 + i], n_prompt + i)
    state = saved(ctx, whole)
    decode(again, list(range(50, 90)), 0)  # is replaced
    assert restored(again, state, whole)
    held = [
        [library.heads_positions(llama.llama_get_memory(c), 1, head) for head in range(4)]
        for c in (ctx, again)
    ]
    assert np.array_equal(*held)
    for step, tokens in enumerate(([7], list(range(120, 140)), [9])):  # the second evicts again
        at = n_prompt + 60 + (0, 1, 21)[step]
        assert np.array_equal(decode(ctx, tokens, at), decode(again, tokens, at))
    assert len(saved(ctx, whole)) == len(saved(again, whole))
    llama.llama_free(ctx)
    llama.llama_free(again)


def test_a_state_is_as_small_as_what_was_kept(llava: VisionModel) -> None:
    ctx = raw_context(llava)
    assert ctx
    decode(ctx, list(range(10, 210)), 0)
    row = 2 * 32 * 2  # K and V of one position and head, f16
    kept = 5 * 4 * 40 * row
    assert kept < len(saved(ctx, True)) < 1.1 * kept
    llama.llama_free(ctx)


def test_a_state_of_other_budgets_types_or_caches_is_refused(llava: VisionModel) -> None:
    ctx = raw_context(llava)
    assert ctx
    decode(ctx, list(range(10, 110)), 0)
    state = saved(ctx, True)

    others = [raw_context(llava, type_k=8, type_v=8)]
    evict_by(llava, FORTY + 1)
    others.append(raw_context(llava))
    evict_by(llava, None)
    others.append(raw_context(llava, flash_attn_type=1))
    for other in others:
        assert other
        assert not restored(other, state, True)
        llama.llama_free(other)

    # cut short or damaged: refused, and the context reads the next prompt
    evict_by(llava, FORTY)
    expected = decode(ctx, [7], 100)
    for broken in (state[: len(state) // 2], state[:700], state[:690] + b"\xff" * 200 + state[890:]):
        other = raw_context(llava)
        assert other
        assert not restored(other, broken, True)
        decode(other, list(range(10, 110)), 0)
        assert np.array_equal(decode(other, [7], 100), expected)
        llama.llama_free(other)
    llama.llama_free(ctx)


# --- when


def test_single_tokens_and_several_outputs_never_evict(llava: VisionModel) -> None:
    ctx = raw_context(llava)
    assert ctx
    memory = llama.llama_get_memory(ctx)
    for i in range(60):
        decode(ctx, [10 + i], i)
    append(ctx, list(range(10, 40)), 60, n_asking=30)
    stats = library.heads_stats(memory)
    assert stats is not None and (stats.n_evictions, stats.n_kept) == (0, 90 * 20)
    decode(ctx, [30, 31], 90)  # the prompt ends
    stats = library.heads_stats(memory)
    assert stats is not None and (stats.n_evictions, stats.n_kept) == (1, 40 * 20)
    llama.llama_free(ctx)


def test_tokens_appended_together_are_those_appended_one_by_one(llava: VisionModel) -> None:
    """After the eviction, a batch attends causally among its own tokens, over more than one growth step."""
    prompt, more = list(range(10, 110)), [30 + i % 200 for i in range(150)]
    logits = []
    for size in (150, 1):
        ctx = raw_context(llava)
        assert ctx
        decode(ctx, prompt, 0)
        for i in range(0, len(more), size):
            last = decode(ctx, more[i : i + size], 100 + i)
        logits.append(last)
        llama.llama_free(ctx)
    assert relative_error(np.array(logits[:1]), np.array(logits[1:])) < 2e-3


def test_a_kv_override_switches_eviction_off(llava: VisionModel, tmp_path: Any) -> None:
    from helpers.model_files import random_scores
    from sparsemm_edge.budgets import BudgetSpec
    from sparsemm_edge.convert import convert

    spec = BudgetSpec(budget=40, window=8)
    file = convert(llava.path, random_scores(llava.path, tmp_path), tmp_path / "m.gguf", spec=spec).path
    for enabled in (True, False):
        overrides = (llama.llama_model_kv_override * 2)()
        overrides[0].key = b"sparsemm.enabled"
        overrides[0].tag = llama.LLAMA_KV_OVERRIDE_TYPE_BOOL
        overrides[0].value.val_bool = enabled
        params = llama.llama_model_default_params()
        params.kv_overrides = ctypes.cast(overrides, ctypes.POINTER(llama.llama_model_kv_override))
        pointer = llama.llama_model_load_from_file(str(file).encode(), params)
        assert llama._lib.llama_model_head_params(pointer).enabled == enabled
        llama.llama_model_free(pointer)
