"""What a page says, and how much of it an answer got right."""

import numpy as np

from sparsemm_edge.pages import Page


def page_text(page: Page) -> str:
    """The text of a page in reading order: its own, or its chunks with blanks between."""
    text = getattr(page, "text", None)
    return text if isinstance(text, str) else " ".join(chunk.text for chunk in page.chunks)


def character_accuracy(answer: str, truth: str) -> float:
    """1 - edit distance / length of the truth, at least 0; white space is left out of both.

    1 is a perfect answer. An answer that goes on and on is worth no more than none.
    """
    answer, truth = ("".join(text.split()) for text in (answer, truth))
    if not truth:
        return float(not answer)
    return max(0.0, 1 - edit_distance(answer, truth) / len(truth))


def edit_distance(one: str, other: str) -> int:
    """The fewest characters to insert, delete or replace to make one string of the other (Levenshtein)."""
    codes = np.array([ord(char) for char in other], dtype=np.int64)
    ramp = np.arange(len(other) + 1)
    row = ramp
    for i, char in enumerate(one):
        following = np.empty_like(row)
        following[0] = i + 1
        np.minimum(row[1:] + 1, row[:-1] + (codes != ord(char)), out=following[1:])
        row = np.minimum.accumulate(following - ramp) + ramp  # insertions, one after the other
    return int(row[-1])
