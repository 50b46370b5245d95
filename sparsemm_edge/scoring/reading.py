"""The text of a page, and the accuracy of an answer about it."""

from sparsemm_edge.evaluation.metrics import character_error_rate
from sparsemm_edge.pages import Page
from sparsemm_edge.pages.scenes import Scene, named


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
