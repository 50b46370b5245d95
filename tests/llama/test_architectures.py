"""Three claims about every architecture: no eviction, no change; heads keep and say what the oracle's do; and
a saved state goes on as if nothing had been between. test_eviction.py says more of LLaVA and Qwen2-VL."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from helpers.architectures import MODELS, TEXT_MODELS, made
from helpers.claims import (
    Case,
    check_that_a_saved_state_goes_on,
    check_that_large_budgets_change_nothing,
    check_what_heads_keep_and_say,
    oracle_prompt,
)
from helpers.models import sample_image
from helpers.oracle import Oracle
from sparsemm_edge.runtime import VisionModel
from sparsemm_edge.runtime.prompt import ImagePart, image_marker

TEXT = f"USER: Look at this {image_marker()} and say what it shows, in the words of the page. ASSISTANT:"
ERROR = 1e-2  # of logits


@cache
def oracle_of(name: str) -> Oracle:
    kind = AutoModelForCausalLM if name in TEXT_MODELS else AutoModelForImageTextToText
    return Oracle(made(name).hf, kind)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    files = made(request.param)
    with (
        VisionModel.load(files.text, files.mmproj, n_threads=1) as model,
        model.tokenize(TEXT, [sample_image((150, 120), 7)]) as prompt,
    ):
        assert any(isinstance(part, ImagePart) for part in prompt.parts)
        yield Case(request.param, model, prompt, budget=40)


def test_budgets_that_hold_the_prompt_change_nothing(case: Case) -> None:
    """But for rounding: the evicting cache hands its rows to attention in another order of tiles."""
    check_that_large_budgets_change_nothing(
        case, oracle_of(case.name), oracle_prompt(case, oracle_of(case.name)), ERROR, 2e-3
    )


def test_heads_keep_and_say_what_the_oracles_do(case: Case) -> None:
    check_what_heads_keep_and_say(
        case, oracle_of(case.name), oracle_prompt(case, oracle_of(case.name)), ERROR
    )


def test_a_saved_state_goes_on_as_if_nothing_had_been_between(case: Case) -> None:
    check_that_a_saved_state_goes_on(case)
