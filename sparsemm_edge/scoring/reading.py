"""What a page says, and how much of it an answer got right."""

from sparsemm_edge.evaluation.metrics import character_error_rate
from sparsemm_edge.pages import Page
from sparsemm_edge.pages.scenes import Scene, named


def page_text(page: Page) -> str:
    """The text of a page in reading order: its own, or its chunks with blanks between."""
    text = getattr(page, "text", None)
    return text if isinstance(text, str) else " ".join(chunk.text for chunk in page.chunks)


def reading_accuracy(answer: str, page: Page) -> float:
    """Character accuracy of an answer that should be the page's text: 1 - character error rate, at least 0.

    White space does not count, since where a model breaks lines is its own affair. Of a scene it is the share
    of the things asked for that the answer names.
    """
    if isinstance(page, Scene):
        return named(answer, page)
    said, there = ("".join(text.split()) for text in (answer, page_text(page)))
    return max(0.0, 1 - character_error_rate(said, there)) if there else float(not said)
