"""The claims of test_architectures.py about models of which only some layers evict: no eviction, no change;
heads keep and say what the oracle's do; and a saved state goes on as if nothing had been between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from helpers import claims
from helpers.agreement import relative_error
from helpers.claims import (
    Case,
    answer,
    check_that_a_saved_state_goes_on,
    check_that_large_budgets_change_nothing,
    check_what_heads_keep_and_say,
)
from helpers.mixed_layers import SPECS, MixedOracle, made
from helpers.models import sample_image
from helpers.oracle import Prompt as OraclePrompt
from sparsemm_edge.runtime import VisionModel
from sparsemm_edge.runtime.attention import StrongestPositions
from sparsemm_edge.runtime.context import Context
from sparsemm_edge.runtime.library import llama
from sparsemm_edge.runtime.prompt import ImagePart, image_marker

# more than the cells that Gemma's layers with a sliding window have (256)
TEXT = (
    "USER: The quick brown fox jumps over the lazy dog; 3 apples and 14 pears cost $7.50, no? ASSISTANT: " * 4
)
ERROR = 2e-2  # of logits: llama.cpp attends in f16


def oracle_prompt(case: Case) -> OraclePrompt:
    """With what the decoder of Gemma is given besides the embeddings of an image."""
    found = claims.oracle_prompt(case, oracle_of(case.name))
    if found.is_image.any() and case.name == "gemma3":
        return replace(found, more={"attention_mask": masks(found)})
    if found.is_image.any() and case.name == "gemma4":  # llama.cpp takes the first token's for an image
        ids = torch.from_numpy(np.maximum(found.ids, 0))[None].long()
        more = {"per_layer_inputs": oracle_of(case.name).decoder.get_per_layer_inputs(ids, None)}
        return replace(found, more=more)
    return found


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
        yield Case(request.param, model, prompt, budget=60, n_ubatch=64)


def test_budgets_that_hold_the_prompt_change_nothing(case: Case) -> None:
    check_that_large_budgets_change_nothing(case, oracle_of(case.name), oracle_prompt(case), ERROR, 5e-3)


def test_heads_keep_and_say_what_the_oracles_do(case: Case) -> None:
    check_what_heads_keep_and_say(case, oracle_of(case.name), oracle_prompt(case), ERROR)


@contextmanager
def with_image(name: str) -> Iterator[Case]:
    text = f"{TEXT[:400]} USER: And this: {image_marker()} What does it show, in your own words? ASSISTANT:"
    files = made(name)
    with (
        VisionModel.load(files.text, files.mmproj, n_threads=1) as model,
        model.tokenize(text, [sample_image(112, 7)]) as prompt,
    ):
        images = [part for part in prompt.parts if isinstance(part, ImagePart)]
        assert [model.is_non_causal(part) for part in images] == [name == "gemma3"]
        yield Case(name, model, prompt, budget=60, n_ubatch=64)


@pytest.mark.parametrize("name", SPECS)
def test_an_image_among_the_text(name: str) -> None:
    with with_image(name) as case:
        test_budgets_that_hold_the_prompt_change_nothing(case)
        test_heads_keep_and_say_what_the_oracles_do(case)
        check_that_a_saved_state_goes_on(case)


def test_an_image_that_attends_to_all_of_itself() -> None:
    """Gemma 3 reads the tokens of an image without a causal mask, also when it reads layer by layer."""
    with with_image("gemma3") as case:
        causal = replace(oracle_prompt(case), more={})
        other, right = (oracle_of("gemma3").run(each, n_predict=1) for each in (causal, oracle_prompt(case)))
        assert relative_error(other.logits, right.logits) > 2 * ERROR, "the mask did not matter"


def test_a_reply_is_dropped_if_all_layers_can(case: Case) -> None:
    """A sliding window can go back as far as it holds what came before, a recurrent state cannot."""
    with case.context(case.table()) as context:
        case.read(context)
        n_past, n_tokens = context.n_past, context.n_tokens
        token = int(context.logits().argmax())
        tokens, logits = answer(context, 4)
        assert tokens[0] == token
        following = context.logits()
        done = context.truncate(n_past, n_tokens)
        assert done == case.name.startswith("gemma")
        if done:
            found = []
            for each in tokens:
                context.decode(each)
                found.append(context.logits())
            assert np.array_equal(found, [*logits[1:], following])
        else:
            context.decode(token)  # goes on where it was
            assert context.n_tokens == n_tokens + 5


def test_a_saved_state_goes_on_as_if_nothing_had_been_between(case: Case) -> None:
    check_that_a_saved_state_goes_on(case)


def test_heads_of_the_layers_that_evict_can_be_scored(case: Case) -> None:
    """A position for each of their heads, at most the last one, and not the same for all."""
    shape = case.model.shape
    n_layer = int(llama.llama_model_n_layer(case.model.pointer))
    attention = StrongestPositions(n_layer, shape.n_head, shape.layer_numbers)
    n_ctx = case.prompt.n_tokens + 8
    with Context(case.model, n_ctx=n_ctx, n_ubatch=64, flash_attn=False, attention=attention) as context:
        case.read(context)
        strongest = attention.take()
    assert strongest.shape == (shape.n_layer, shape.n_head)
    assert strongest.min() >= 0 and strongest.max() < case.prompt.n_tokens
    assert len(np.unique(strongest)) > 1
