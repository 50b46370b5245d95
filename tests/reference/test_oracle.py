"""The oracle checks itself: against transformers where nothing is evicted, against cases done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from helpers.models import NAMES, sample_image, test_model
from helpers.oracle import (
    Oracle,
    OracleResult,
    attention_of_the_last,
    choose,
    compare_kept,
    leads,
)

QUESTION = "What is written here? Answer briefly."


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_with_a_full_budget_it_is_transformers_own_greedy_answer(name: str, with_image: bool) -> None:
    model = test_model(name)
    oracle = Oracle(model.hf)
    images = [sample_image(model.image_size, 3)] if with_image else []
    prompt = oracle.prompt(oracle.chat(QUESTION, len(images)), images)
    table = np.full((oracle.n_layer, oracle.n_head_kv), len(prompt))
    found = oracle.run(prompt, table, n_predict=16)

    plain = AutoModelForImageTextToText.from_pretrained(model.hf, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompt.ids)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        batch = oracle.image_processor(images)
        inputs["pixel_values"] = torch.from_numpy(np.asarray(batch["pixel_values"], np.float32))
        if oracle.is_qwen:
            inputs["image_grid_thw"] = torch.from_numpy(np.asarray(batch["image_grid_thw"]))
            inputs["mm_token_type_ids"] = torch.from_numpy(prompt.is_image)[None].int()
    with torch.no_grad():
        expected = plain.generate(**inputs, max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert found.tokens == expected.tolist()
    assert all(len(positions) == len(prompt) for heads in found.kept for positions in heads)


def test_an_evicted_head_decodes_like_a_model_that_never_saw_the_positions() -> None:
    """If all heads keep the same positions, masking them is removing them from the cache."""
    model = test_model("llava-gqa")
    oracle = Oracle(model.hf)
    prompt = oracle.prompt(oracle.chat(QUESTION, 1), [sample_image(model.image_size, 3)])
    n = len(prompt)
    some = np.sort(np.random.default_rng(0).permutation(n)[:60])
    kept = [[some] * oracle.n_head_kv] * oracle.n_layer
    found = oracle.run(prompt, kept=kept, n_predict=12)

    plain = AutoModelForImageTextToText.from_pretrained(model.hf, dtype=torch.float32).eval()
    with torch.no_grad():
        out = plain.model.language_model(inputs_embeds=prompt.embeds, use_cache=True)
        for layer in out.past_key_values.layers:
            layer.keys, layer.values = layer.keys[:, :, some], layer.values[:, :, some]
        tokens, hidden = [], out.last_hidden_state
        for i in range(12):
            tokens.append(int(plain.lm_head(hidden[0, -1]).argmax()))
            hidden = plain.model.language_model(
                input_ids=torch.tensor([tokens[-1:]]),
                position_ids=torch.tensor([[n + i]]),
                past_key_values=out.past_key_values,
                use_cache=True,
            ).last_hidden_state
    assert found.tokens == tokens


def test_the_vote_by_hand() -> None:
    """Two query heads on one KV head, one dimension, five positions, the last two vote."""
    query = torch.zeros(2, 5, 1)
    query[0, 3], query[0, 4], query[1, 3], query[1, 4] = 1.0, 2.0, 0.0, -1.0
    key = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0]).view(1, 5, 1)
    votes = attention_of_the_last(query, key, 2)

    def softmax(values: list[float]) -> np.ndarray:
        e = np.exp(values)
        return e / e.sum()

    assert votes.shape == (2, 2, 5)
    assert np.allclose(votes[0, 0, :4], softmax([0.0, 1.0, 2.0, 0.5]))
    assert votes[0, 0, 4] == 0, "the query at 3 does not see position 4"
    assert np.allclose(votes[0, 1], softmax([0.0, 2.0, 4.0, 1.0, -2.0]))
    assert np.allclose(votes[1, 0, :4], [0.25] * 4)
    assert np.allclose(votes[1, 1], softmax([0.0, -1.0, -2.0, -0.5, 1.0]))


def test_the_choice_by_hand() -> None:
    scores = np.array([0.1, 0.5, 0.2, 0.5, 0.3, 0.0])  # of a prompt of 9, window 3
    held = np.arange(9)
    assert choose(scores, held, 5, 3).tolist() == [1, 3, 6, 7, 8]
    assert choose(scores, held, 6, 3).tolist() == [1, 3, 4, 6, 7, 8]
    assert choose(scores, held, 4, 3).tolist() == [1, 6, 7, 8], "of equals the first"
    assert choose(scores, held, 9, 3).tolist() == list(range(9)), "a budget of the prompt's length keeps it"
    assert choose(scores, held, 3, 3).tolist() == [6, 7, 8], "nothing but the window"
    some = np.array([0, 2, 4, 6, 7, 8])
    assert choose(scores, some, 4, 3).tolist() == [4, 6, 7, 8], "only what the head still holds"


def test_what_the_heads_keep_is_their_budget_and_the_window() -> None:
    model = test_model("llava")
    oracle = Oracle(model.hf)
    prompt = oracle.prompt(oracle.chat(QUESTION, 1), [sample_image(model.image_size, 3)])
    n = len(prompt)
    table = np.random.default_rng(1).integers(16, n + 20, (oracle.n_layer, oracle.n_head_kv))
    found = oracle.run(prompt, table, window=16, n_predict=1)
    for il in range(oracle.n_layer):
        for ih in range(oracle.n_head_kv):
            positions = found.kept[il][ih]
            assert len(positions) == min(table[il, ih], n)
            assert positions[-16:].tolist() == list(range(n - 16, n))
            assert found.scores[il][ih].shape == (n - 16,)
            dropped = np.setdiff1d(np.arange(n - 16), positions)
            chosen = positions[positions < n - 16]
            if len(dropped) and len(chosen):
                assert found.scores[il][ih][chosen].min() >= found.scores[il][ih][dropped].max()


def test_a_short_last_batch_votes_with_the_queries_it_has() -> None:
    model = test_model("llava-gqa")
    oracle = Oracle(model.hf)
    prompt = oracle.prompt(oracle.chat(QUESTION, 1), [sample_image(model.image_size, 3)])
    table = np.full((oracle.n_layer, oracle.n_head_kv), 48)
    whole = oracle.run(prompt, table, n_predict=1)
    short = oracle.run(prompt, table, n_predict=1, n_vote=5)
    longer = oracle.run(prompt, table, n_predict=1, n_vote=1000)
    assert compare_kept(whole, longer.kept).share == 1.0
    assert compare_kept(whole, short.kept).share < 1.0
    assert len(short.scores[0][0]) == len(prompt) - 32, "the window is kept whole all the same"
    votes = attention_of_the_last(oracle.taps[0].query, oracle.taps[0].key, 5)
    mean = votes[:4, :, : len(prompt) - 32].mean((0, 1))
    assert short.scores[0][0].max() == pytest.approx(float(mean.max()), rel=1e-5)


def test_comparing_kept_positions_tells_ties_from_errors() -> None:
    scores = [[np.array([0.5, 0.301, 0.3, 0.1])]]
    expected = OracleResult([[np.array([0, 1, 4, 5])]], scores, [], np.empty((0, 0)))

    def compare(*positions: int) -> tuple[int, int, int]:
        agreement = compare_kept(expected, [[np.array(positions)]])
        return agreement.n_kept, agreement.n_same, agreement.n_unexplained

    assert compare(0, 1, 4, 5) == (4, 4, 0)
    assert compare(0, 2, 4, 5) == (4, 3, 0), "a near tie at the cut"
    assert compare(0, 3, 4, 5) == (4, 3, 1), "0.1 is far below the cut of 0.301"
    assert compare(1, 2, 4, 5) == (4, 3, 1), "0.5 is far above it"
    assert compare(0, 1, 2, 5)[2] > 0, "the window is not for choice"
    assert compare(0, 1, 4)[2] == 4, "too few"


def test_leads_are_zero_for_the_greedy_answer() -> None:
    logits = np.array([[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])
    result = OracleResult([], [], [2, 0], logits)
    assert leads(result, [2, 0]).tolist() == [0.0, 0.0]
    assert leads(result, [1, 0])[0] == pytest.approx(2.0 / logits[0].std())
