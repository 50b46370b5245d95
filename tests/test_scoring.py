"""Scoring: the hits are those of a naive oracle, and the scores come out the same however they are made."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from vision_models import ARCHITECTURES, letters_page, make

from sparsemm_edge.pages import Chunk, Page
from sparsemm_edge.scoring.models import VisionLanguageModel, load
from sparsemm_edge.scoring.target_response import score_page, unique_chunk

torch.set_num_threads(1)

N_NEW = 20


@cache
def checkpoint(name: str) -> Path:
    return make(name, Path(mkdtemp()))


@cache
def model(name: str) -> VisionLanguageModel:
    return load(str(checkpoint(name)))


# --- the oracle: DESIGN section 3, "Head scores", and nothing else -------------------------------------


def oracle(name: str, page: Page, question: str) -> tuple[np.ndarray, int, int, list[int]]:
    """Scores [n_layer][n_head], tokens said, tokens scored and the tokens, with eager attention, whole
    matrices, no cache and plain loops. The prompt and which tokens a box covers are what is scored with, and
    are tested on their own."""
    ours = model(name)
    eager = AutoModelForImageTextToText.from_pretrained(
        checkpoint(name), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompt = ours.prompt(question, page.image)
    inputs = dict(prompt.inputs)
    said: list[int] = []
    scored = 0
    scores = [[0.0] * ours.n_head for _ in range(ours.n_layer)]
    while len(said) < N_NEW:
        new = torch.tensor([said], dtype=torch.int64)
        inputs["input_ids"] = torch.cat([prompt.inputs["input_ids"], new], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat(
                [prompt.inputs["mm_token_type_ids"], torch.zeros_like(new).int()], dim=1
            )
        with torch.no_grad():
            output = eager(**inputs, use_cache=False, output_attentions=True)
        said.append(int(output.logits[0, -1].argmax()))
        if said[-1] == 1:  # end of the answer
            break
        text = ours.tokenizer.decode([said[-1]], skip_special_tokens=True).strip()
        holders = [chunk for chunk in page.chunks if text and text in chunk.text]
        if len(holders) != 1:
            continue
        covered = [int(prompt.image_positions[i]) for i in prompt.layout.covered(holders[0].box)]
        if not covered:
            continue
        scored += 1
        for il in range(ours.n_layer):
            for ih in range(ours.n_head):
                weights = output.attentions[il][0, ih, -1].tolist()
                strongest = max(range(len(weights)), key=lambda position: weights[position])
                if strongest in covered:
                    scores[il][ih] += 1 / len(covered)
    return np.array(scores), len(said), scored, said


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hits_are_those_of_the_naive_oracle(name: str) -> None:
    hits = 0.0
    for seed, size in enumerate([(300, 220), (180, 260)]):
        page = letters_page(size, seed)
        expected, n_tokens, n_scored, said = oracle(name, page, "read")
        got = score_page(model(name), page, "read", N_NEW)
        assert got.answer == model(name).decode(said)
        assert (got.n_tokens, got.n_scored) == (n_tokens, n_scored)
        np.testing.assert_allclose(got.scores, expected, rtol=1e-12)
        assert 0 < n_scored <= n_tokens
        hits += got.scores.sum()
    assert hits > 0


def test_the_oracle_also_agrees_in_half_precision() -> None:
    """bfloat16 rounds many weights to the same value; the strongest is found before they are rounded."""
    page = letters_page()
    expected = score_page(model("llava-next"), page, "read", 1)
    half = load(str(checkpoint("llava-next")), dtype="bfloat16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    got = score_page(half, page, "read", 1)
    assert got.scores.shape == expected.scores.shape


def test_scoring_leaves_no_attention_weights_behind_and_ends_listening() -> None:
    scored = model("qwen2-vl")
    score_page(scored, letters_page(), "read", 4)
    for attention in scored.attentions:
        assert attention.sparsemm_tap.n_prompt is None
        assert not attention.sparsemm_tap.strongest


# --- the unique-chunk rule ----------------------------------------------------------------------------

BOX = (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("token", "found"),
    [
        ("visual", "visual"),
        (" visual", "visual"),  # a token brings its blank along
        ("vis", "visual"),  # a piece of a word
        ("d", None),  # in head and in heads
        ("u", "visual"),  # a single character that one chunk alone has
        (".", "end."),
        ("head", None),  # in head and in heads
        ("heads", "heads"),
        ("Visual", None),  # as it is written
        ("", None),
        (" ", None),
        ("\n", None),
        ("�", None),
        ("seen", None),
    ],
)
def test_a_token_counts_if_exactly_one_chunk_has_it(token: str, found: str | None) -> None:
    chunks = [Chunk(text, BOX) for text in ("visual", "head", "heads", "end.")]
    chunk = unique_chunk(token, chunks)
    assert (None if chunk is None else chunk.text) == found


def test_the_same_word_twice_on_a_page_does_not_count() -> None:
    assert unique_chunk("head", [Chunk("head", BOX), Chunk("head", BOX)]) is None
