"""The target response of every query head on one page: DESIGN section 3, "Head scores".

Nothing of size prompt x prompt is ever held. While the model answers, each attention layer is computed as
usual (sdpa), and beside it, for the last query alone, which position it attends to most. That is one number
per head and token, and all that the scores need.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparsemm_edge.pages import Chunk, Page
from sparsemm_edge.scoring.models import VisionLanguageModel
from sparsemm_edge.scoring.reading import page_text, reading_accuracy

_ATTENTION = "sparsemm_target_response"


class _Tap:
    """The strongest positions of one layer's heads, a tensor [n_head] for each forward pass.

    Attributes:
        n_prompt: length of the prompt; None: not listening.
    """

    def __init__(self) -> None:
        self.n_prompt: int | None = None
        self.strongest: list[torch.Tensor] = []


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    tap: _Tap = module.sparsemm_tap
    if tap.n_prompt is not None:
        # a layer with a sliding window holds only the end of the context
        offset = tap.n_prompt + len(tap.strongest) - key.shape[2]
        tap.strongest.append(_strongest(query, key, attention_mask) + offset)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _strongest(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The key that each head's last query attends to most: int64 [n_head].

    The largest logit is the largest weight, so there is no softmax. Computed in float32: in half precision
    the largest of thousands of weights is often a tie.

    Args:
        query: [1, n_head, n, head_dim].
        key: [1, n_head_kv, n_kv, head_dim].
        mask: None, or [1, 1 or n_head, n, n_kv]; bool (True: visible) or added to the logits.
    """
    n_head, n_head_kv = query.shape[1], key.shape[1]
    row = query[0, :, -1].float().view(n_head_kv, n_head // n_head_kv, -1)
    logits = (row @ key[0].float().transpose(1, 2)).view(n_head, -1)
    if mask is not None:
        seen = mask[0, :, -1, : logits.shape[1]]
        logits = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen.float()
    return logits.argmax(dim=1)


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


@contextmanager
def strongest_positions(model: VisionLanguageModel, n_prompt: int) -> Iterator[list[_Tap]]:
    """Within, the model remembers for every forward pass which position each head attends to most.

    Yields the taps of the layers; `table` reads them.
    """
    if model.decoder.config._attn_implementation != _ATTENTION:
        model.decoder.set_attn_implementation(_ATTENTION)
        for attention in model.attentions:
            attention.sparsemm_tap = _Tap()
    taps = [attention.sparsemm_tap for attention in model.attentions]
    for tap in taps:
        tap.n_prompt = n_prompt
    try:
        yield taps
    finally:
        for tap in taps:
            tap.n_prompt = None
            tap.strongest.clear()


def table(taps: list[_Tap]) -> npt.NDArray[np.int64]:
    """The strongest positions: [n_passes, n_layer, n_head]."""
    layers = [torch.stack(tap.strongest).cpu().numpy() for tap in taps]
    return np.stack(layers, axis=1)


@dataclass(frozen=True)
class PageScores:
    """What one page says about the heads.

    Attributes:
        scores: float64 [n_layer, n_head], the sum of the target responses.
        n_tokens: tokens of the answer.
        n_scored: those found in exactly one chunk of the page, of which the model sees something.
        answer: the answer.
        accuracy: its character accuracy, 0 to 1.
    """

    scores: npt.NDArray[np.float64]
    n_tokens: int
    n_scored: int
    answer: str
    accuracy: float


def unique_chunk(text: str, chunks: Sequence[Chunk]) -> Chunk | None:
    """The one chunk that a token's text is found in, or None.

    The text is looked up as it is, less the blanks around it, anywhere in a chunk: a piece of a word, a
    single character and a punctuation mark count if one chunk alone has them. Blanks, special tokens and
    halves of a multi-byte character are found nowhere.
    """
    text = text.strip()
    found = [chunk for chunk in chunks if text and text in chunk.text]
    return found[0] if len(found) == 1 else None


def answer_limit(model: VisionLanguageModel, page: Page) -> int:
    """Tokens after which an answer about a page is cut off: twice what its text takes, and a few."""
    return 2 * len(model.tokenizer(page_text(page), add_special_tokens=False)["input_ids"]) + 16


def score_page(
    model: VisionLanguageModel, page: Page, question: str, max_new_tokens: int | None = None
) -> PageScores:
    """Ask for the text of a page and score every head by what it attends to while answering.

    Args:
        max_new_tokens: where an answer is cut off; None: `answer_limit`.
    """
    prompt = model.prompt(question, page.image)
    with strongest_positions(model, prompt.n_tokens) as taps:
        tokens = model.answer(prompt, max_new_tokens or answer_limit(model, page))
        strongest = table(taps)

    scores = np.zeros((model.n_layer, model.n_head))
    n_scored = 0
    for token, positions in zip(tokens, strongest, strict=False):
        chunk = unique_chunk(model.decode([token]), page.chunks)
        if chunk is None:
            continue
        covered = prompt.layout.covered(chunk.box)
        if not covered.size:  # cropped away
            continue
        n_scored += 1
        scores += np.isin(positions, prompt.image_positions[covered]) / covered.size
    answer = model.decode(tokens)
    return PageScores(scores, len(tokens), n_scored, answer, reading_accuracy(answer, page))
