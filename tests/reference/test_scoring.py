"""Scoring: the hits are those of a naive oracle, and the scores come out the same however they are made."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from helpers.vision_models import ARCHITECTURES, letters_page, make
from sparsemm_edge.pages import Chunk, Page
from sparsemm_edge.scoring.models import VisionLanguageModel, load
from sparsemm_edge.scoring.strongest import _strongest, strongest_positions, table
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


@pytest.mark.parametrize("name", ["llava-next-mistral", "qwen2-vl"])
def test_the_query_of_the_first_token_is_the_last_of_the_prompt(name: str) -> None:
    """Every head's strongest position, whether or not it is a hit, of the pass that reads the prompt."""
    ours = model(name)
    prompt = ours.prompt("read", letters_page().image)
    with strongest_positions(ours.decoder, ours.attentions, prompt.n_tokens) as found:
        ours.answer(prompt, 1)
        got = table(found)
    eager = AutoModelForImageTextToText.from_pretrained(
        checkpoint(name), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        attentions = eager(**prompt.inputs, use_cache=False, output_attentions=True).attentions
    expected = np.array([layer[0, :, -1].argmax(dim=1).tolist() for layer in attentions])
    np.testing.assert_array_equal(got, expected[None])
    assert len(np.unique(got)) > 3


def test_half_precision_ranks_positions_before_it_rounds_them() -> None:
    """In bfloat16 the largest of thousands of weights are often ties; products in float32 are not."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 64, 1, 64, generator=generator).bfloat16()
    key = torch.randn(1, 2, 4000, 64, generator=generator).bfloat16()
    exact = query[0].double() @ key[0].double().repeat_interleave(32, 0).transpose(1, 2)
    strongest = exact[:, 0].argmax(dim=1)
    assert torch.equal(_strongest(query, key, None), strongest)
    assert not torch.equal(exact.bfloat16()[:, 0].argmax(dim=1), strongest)


def test_scoring_leaves_no_attention_weights_behind_and_ends_listening() -> None:
    scored = model("qwen2-vl")
    score_page(scored, letters_page(), "read", 4)
    for attention in scored.attentions:
        assert attention.sparsemm_tap is None


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
