"""Whether llama.cpp keeps, says and holds what the PyTorch oracle does, but for ties."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from helpers.contexts import context_of, evict_by, random_table, slots_of
from helpers.models import sample_image, test_model
from helpers.oracle import Agreement, Conversation, Oracle, OracleResult, Slot, compare_kept
from sparsemm_edge.runtime import VisionModel
from sparsemm_edge.runtime.context import Context, KVStats
from sparsemm_edge.runtime.encode import encode, encode_text

TEXT = "The quick brown fox jumps over the lazy dog; 3 apples and 14 pears cost $7.50, no? " * 2
QUESTION = "What is written here? Answer briefly, in the words of the page itself."
TURNS = ("And what of the 7 red foxes and the 9 lazy dogs?", "Now say it again, in fewer words than before.")


@cache
def oracle_of(name: str) -> Oracle:
    return Oracle(test_model(name).hf)


def ask(name: str, kind: str) -> tuple[str, list[Any]]:
    """A prompt in the chat template of a test model, of one kind: a question about an image, or a text."""
    if kind == "text":
        return oracle_of(name).chat(TEXT), []
    return oracle_of(name).chat(QUESTION, 1), [sample_image(test_model(name).image_size, 7)]


def slots_alike(oracle: Oracle, found: list[list[Any]], expected: list[list[Slot | None]]) -> None:
    """The same heads have slots, for as many positions, of the same K and V but for a hundredth."""

    def in_order(key: np.ndarray) -> np.ndarray:
        """llama.cpp rotates neighbours in LLaMA models, so their converter puts the halves of a key so."""
        return key if oracle.is_qwen else key.reshape(2, -1).T.ravel()

    for heads, expected_heads in zip(found, expected, strict=True):
        for slot, wanted in zip(heads, expected_heads, strict=True):
            assert (slot is None) == (wanted is None)
            if wanted is None:
                continue
            n_lost, key, value = slot
            assert n_lost == wanted.count
            for is_like, should in ((key, in_order(wanted.key.numpy())), (value, wanted.value.numpy())):
                assert np.linalg.norm(is_like - should) < 1e-2 * np.linalg.norm(should)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative L2 error of a step's logits."""
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


def keeps_alike(expected: OracleResult, kept: list[list[np.ndarray]]) -> Agreement:
    """What differs in a single run must be a near tie at the cut, and rare."""
    agreement = compare_kept(expected, kept)
    assert agreement.share >= 0.97
    assert agreement.n_unexplained == 0
    return agreement


def answers_alike(context: Context, talk: Conversation, expected: OracleResult, n: int) -> None:
    """After a prompt, of which `expected` should be kept: n tokens from there are the oracle's but for ties,
    and all heads then hold what the oracle's do."""
    kept = context.kept()
    keeps_alike(expected, kept)
    talk.keep(kept)
    slots_alike(talk.oracle, slots_of(context), talk.slots)
    for _ in range(n):
        logits = context.logits()
        assert relative_error(logits[None], talk.logits[None]) < 1e-2
        token = int(logits.argmax())
        lead = talk.logits.max() - talk.logits[token]
        assert lead < 2e-2 * talk.logits.std(), "not the oracle's token, nor as good as tied"
        context.decode(token)
        talk.say(token)
    for heads, expected_heads in zip(context.kept(), talk.held, strict=True):
        assert all(map(np.array_equal, heads, expected_heads))


def three_turns(
    model: VisionModel,
    oracle: Oracle,
    window: int,
    n_reply: int,
    max_tail: int | None = None,
    vote: str = "snapkv",
    residual: bool = False,
) -> KVStats:
    """A question about an image and two more of text, each with an answer: as the oracle's, step by step."""
    text, images = ask(model.path.parent.name, "image")
    with model.tokenize(text, images) as prompt:
        table = random_table(model, 48, window, prompt.n_tokens, residual=residual)
        evict_by(model, table, window, max_tail or 0, vote, residual)
        talk = oracle.conversation(window, max_tail=max_tail, vote=vote, residual=residual)
        expected = talk.read(oracle.prompt(text, images), table)
        with context_of(model, n_ctx=prompt.n_tokens + 512) as context:
            context.prefill(encode(model, prompt))
            for turn in (*TURNS, ""):
                answers_alike(context, talk, expected, n_reply)
                if turn:
                    ids = oracle.tokenizer.encode(turn, add_special_tokens=False)
                    context.prefill(encode_text(np.array(ids, np.int32), context.n_past))
                    expected = talk.read_tokens(ids, table)
            return context.kv_stats()
