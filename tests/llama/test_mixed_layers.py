"""The claims of test_architectures.py about models of which only some layers evict: no eviction, no change;
heads keep and say what the oracle's do; and a saved state goes on as if nothing had been between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch

from helpers.agreement import relative_error
from helpers.contexts import random_table
from helpers.mixed_layers import SPECS, MixedOracle, made
from helpers.models import sample_image
from helpers.oracle import Grid, compare_kept, leads
from helpers.oracle import Prompt as OraclePrompt
from sparsemm_edge.runtime import VisionModel
from sparsemm_edge.runtime.attention import StrongestPositions
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.library import llama
from sparsemm_edge.runtime.prompt import ImagePart, Prompt, image_marker
from sparsemm_edge.runtime.session import Session, start_session_with

# more than the cells that Gemma's layers with a sliding window have (256)
TEXT = (
    "USER: The quick brown fox jumps over the lazy dog; 3 apples and 14 pears cost $7.50, no? ASSISTANT: " * 4
)
WINDOW, N_PREDICT = 8, 24
ERROR = 2e-2  # of logits: llama.cpp attends in f16


@dataclass(frozen=True)
class Case:
    name: str
    model: VisionModel
    prompt: Prompt

    def session(self, table: np.ndarray | None) -> Session:
        budgets = None if table is None else HeadBudgetTable(table, WINDOW, 7, None, "mixkv", True)
        n_ctx = self.prompt.n_tokens + 64
        return start_session_with(self.model, self.prompt, budgets, n_ctx=n_ctx, n_ubatch=64)

    def table(self) -> np.ndarray:
        return random_table(self.model, 60, WINDOW, self.prompt.n_tokens, residual=True)

    def oracle_prompt(self) -> OraclePrompt:
        chunks: list[np.ndarray | Grid] = []
        for part in self.prompt.parts:
            is_image = isinstance(part, ImagePart)
            chunks.append(Grid(self.model.encode_image(part), part.n_tokens) if is_image else part.tokens)
        found = oracle_of(self.name).prompt_of(chunks)
        return found if not found.is_image.any() else replace(found, more={"attention_mask": masks(found)})


def masks(prompt: OraclePrompt) -> dict[str, torch.Tensor]:
    """What a token of Gemma 3 attends to: what comes before it, and all of its own image."""
    at = torch.arange(len(prompt))
    image = torch.from_numpy(prompt.is_image)
    before = (at[None] <= at[:, None]) | (image[None] & image[:, None])
    near = before & (at[:, None] - at[None] < oracle_of("gemma3").decoder.config.sliding_window)
    return {
        name: torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        for name, seen in (("full_attention", before), ("sliding_attention", near))
    }


@cache
def oracle_of(name: str) -> MixedOracle:
    return MixedOracle(made(name).hf)


@pytest.fixture(scope="module", params=SPECS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    files = made(request.param)
    with (
        VisionModel.load(files.text, files.mmproj, n_threads=1) as model,
        model.tokenize(TEXT, []) as prompt,
    ):
        assert prompt.n_tokens > 300
        yield Case(request.param, model, prompt)


def answer(session: Session, n: int = N_PREDICT) -> tuple[list[int], np.ndarray]:
    """A greedy answer, and the logits that it was chosen from [n, n_vocab]."""
    tokens, logits = [], []
    for _ in range(n):
        logits.append(session.logits())
        tokens.append(int(logits[-1].argmax()))
        session.decode(tokens[-1])
    return tokens, np.array(logits)


def test_budgets_that_hold_the_prompt_change_nothing(case: Case) -> None:
    enough = np.full_like(case.table(), case.prompt.n_tokens + 1)
    with case.session(None) as full, case.session(enough) as evicting:
        full.read_prompt()
        evicting.read_prompt()
        assert evicting.kv_stats().n_evictions == 0
        tokens, logits = answer(full)
        expected = oracle_of(case.name).run(case.oracle_prompt(), force=tokens, n_predict=N_PREDICT)
        assert leads(expected, tokens).max() < 2e-2, "the full cache does not say what PyTorch says"
        assert relative_error(logits, expected.logits) < ERROR
        others = []
        for token in tokens:
            others.append(evicting.logits())
            evicting.decode(token)
        assert relative_error(np.array(others), logits) < 5e-3


def test_heads_keep_and_say_what_the_oracles_do(case: Case) -> None:
    table = case.table()
    with case.session(table) as session:
        session.read_prompt()
        kept = session.kept()
        tokens, logits = answer(session)
        assert session.kv_stats().n_evictions == 1
    way = {"vote": "mixkv", "residual": True}
    oracle, prompt = oracle_of(case.name), case.oracle_prompt()
    agreement = compare_kept(oracle.run(prompt, table, WINDOW, 1, **way), kept)
    assert agreement.n_unexplained == 0 and agreement.share >= 0.97
    expected = oracle.run(prompt, table, WINDOW, N_PREDICT, kept=kept, force=tokens, **way)
    assert relative_error(logits, expected.logits) < ERROR
    assert leads(expected, tokens).max() < 2e-2
    full = oracle.run(prompt, n_predict=N_PREDICT, force=tokens)
    assert relative_error(full.logits, expected.logits) > 2 * ERROR, "what was evicted did not matter"


def test_an_image_that_attends_to_all_of_itself() -> None:
    """Gemma 3 reads the tokens of an image without a causal mask, also when it reads layer by layer."""
    text = f"{TEXT[:400]} USER: And this: {image_marker()} What does it show, in your own words? ASSISTANT:"
    files = made("gemma3")
    with (
        VisionModel.load(files.text, files.mmproj, n_threads=1) as model,
        model.tokenize(text, [sample_image(112, 7)]) as prompt,
    ):
        assert [model.is_non_causal(part) for part in prompt.parts if isinstance(part, ImagePart)] == [True]
        case = Case("gemma3", model, prompt)
        test_budgets_that_hold_the_prompt_change_nothing(case)
        test_heads_keep_and_say_what_the_oracles_do(case)
        causal = replace(case.oracle_prompt(), more={})
        other, right = (oracle_of("gemma3").run(each, n_predict=1) for each in (causal, case.oracle_prompt()))
        assert relative_error(other.logits, right.logits) > 2 * ERROR, "the mask did not matter"


def test_a_reply_is_dropped_if_all_layers_can(case: Case) -> None:
    """A sliding window can go back as far as it holds what came before, a recurrent state cannot."""
    with case.session(case.table()) as session:
        session.read_prompt()
        n_past, n_tokens = session._n_past, session.n_tokens
        token = int(session.logits().argmax())
        tokens, logits = answer(session, 4)
        assert tokens[0] == token
        following = session.logits()
        done = session.truncate(n_past, n_tokens)
        assert done == case.name.startswith("gemma")
        if done:
            found = []
            for each in tokens:
                session.decode(each)
                found.append(session.logits())
            assert np.array_equal(found, [*logits[1:], following])
        else:
            session.decode(token)  # goes on where it was
            assert session.n_tokens == n_tokens + 5


def test_a_saved_state_goes_on_as_if_nothing_had_been_between(case: Case) -> None:
    with case.session(case.table()) as session, case.session(case.table()) as other:
        session.read_prompt()
        answer(session, 4)
        state = session.state()
        other.restore(state)
        for heads, restored in zip(session.kept(), other.kept(), strict=True):
            assert all(map(np.array_equal, heads, restored))
        tokens = answer(session)[0][:1] * 3
        session.restore(state)
        found = []
        for each in (session, other):
            logits = []
            for token in tokens:
                each.decode(token)
                logits.append(each.logits())
            found.append(logits)
        assert np.array_equal(*found)


def test_heads_of_the_layers_that_evict_can_be_scored(case: Case) -> None:
    """A position for each of their heads, at most the last one, and not the same for all."""
    shape = case.model.shape
    n_layer = int(llama.llama_model_n_layer(case.model.pointer))
    attention = StrongestPositions(n_layer, shape.n_head, shape.layer_numbers)
    n_ctx = case.prompt.n_tokens + 8
    with start_session_with(
        case.model, case.prompt, None, n_ctx=n_ctx, n_ubatch=64, flash_attn=False, attention=attention
    ) as session:
        session.read_prompt()
        strongest = attention.take()
    assert strongest.shape == (shape.n_layer, shape.n_head)
    assert strongest.min() >= 0 and strongest.max() < case.prompt.n_tokens
    assert len(np.unique(strongest)) > 1
