"""The target response of every query head on one page: DESIGN section 3, "Head scores".

What heads attend to comes from PyTorch (models.py) or llama.cpp (gguf.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from sparsemm_edge.evaluation.metrics import character_error_rate
from sparsemm_edge.pages import Chunk, Page
from sparsemm_edge.pages.scenes import Scene, named
from sparsemm_edge.scoring.geometry import ImageLayout


@dataclass(frozen=True)
class Answer:
    """A greedy answer to a question about a page, and what the heads attended to.

    Attributes:
        tokens: its tokens, the end token included.
        strongest: int64 [n_tokens, n_layer, n_head], the position that the query which produced a token
            attended to most.
        image_positions: int64 [n_image_tokens], where in the prompt the image tokens are.
        layout: the part of the page that each of them shows.
    """

    tokens: list[int]
    strongest: npt.NDArray[np.int64]
    image_positions: npt.NDArray[np.int64]
    layout: ImageLayout


class Reader(Protocol):
    """A vision-language model that records what its heads attend to while it answers.

    Attributes:
        n_layer, n_head, n_head_kv: of the text model.
    """

    n_layer: int
    n_head: int
    n_head_kv: int

    def read(self, question: str, page: Image.Image, max_new_tokens: int) -> Answer:
        """Answer a question about a page greedily."""

    def decode(self, tokens: list[int]) -> str:
        """Tokens as text, without special tokens."""

    def n_text_tokens(self, text: str) -> int:
        """How many tokens a text takes, without special tokens."""


@dataclass(frozen=True)
class PageScores:
    """The scores from one page.

    Attributes:
        scores: float64 [n_layer, n_head], the sum of the target responses.
        n_tokens: tokens of the answer.
        n_scored: those found in exactly one chunk of the page, of which the model sees something.
        answer: the answer.
        accuracy: its accuracy, 0 to 1, see reading_accuracy.
    """

    scores: npt.NDArray[np.float64]
    n_tokens: int
    n_scored: int
    answer: str
    accuracy: float


def unique_chunk(text: str, chunks: Sequence[Chunk]) -> Chunk | None:
    """The only chunk that contains a token's text, or None.

    The text is stripped and searched anywhere in a chunk: parts of words, single characters and punctuation
    count if exactly one chunk contains them. White space, special tokens and parts of multi-byte characters
    match nothing.
    """
    text = text.strip()
    found = [chunk for chunk in chunks if text and text in chunk.text]
    return found[0] if len(found) == 1 else None


def page_text(page: Page) -> str:
    """The text of a page in reading order: its own, or its chunks joined by spaces."""
    text = getattr(page, "text", None)
    return text if isinstance(text, str) else " ".join(chunk.text for chunk in page.chunks)


def reading_accuracy(answer: str, page: Page) -> float:
    """Character accuracy of an answer that should be the page's text: 1 - character error rate, at least 0.

    White space is ignored, as models break lines in different places. For scenes: the fraction of requested
    objects that the answer names.
    """
    if isinstance(page, Scene):
        return named(answer, page)
    said, there = ("".join(text.split()) for text in (answer, page_text(page)))
    return max(0.0, 1 - character_error_rate(said, there)) if there else float(not said)


def answer_limit(reader: Reader, page: Page) -> int:
    """Most tokens of an answer about a page: those of its text, a quarter more, and a few.

    Longer answers repeat themselves or leave the page's text.
    """
    return reader.n_text_tokens(page_text(page)) * 5 // 4 + 24


def score_page(reader: Reader, page: Page, question: str, max_new_tokens: int | None = None) -> PageScores:
    """Ask for the text of a page and score each head by what it attends to while answering.

    Args:
        max_new_tokens: most tokens of the answer; None: `answer_limit`.
    """
    said = reader.read(question, page.image, max_new_tokens or answer_limit(reader, page))
    scores = np.zeros((reader.n_layer, reader.n_head))
    n_scored = 0
    for token, positions in zip(said.tokens, said.strongest, strict=False):
        chunk = unique_chunk(reader.decode([token]), page.chunks)
        if chunk is None:
            continue
        covered = said.layout.covered(chunk.box)
        if not covered.size:  # cropped away
            continue
        n_scored += 1
        scores += np.isin(positions, said.image_positions[covered]) / covered.size
    answer = reader.decode(said.tokens)
    return PageScores(scores, len(said.tokens), n_scored, answer, reading_accuracy(answer, page))
