"""Ablation: silence the heads with the highest scores, or random others, and measure reading accuracy."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.pages.readers import PageSource
from sparsemm_edge.ranking import top_heads
from sparsemm_edge.scores import HeadScores
from sparsemm_edge.scoring.models import VisionLanguageModel
from sparsemm_edge.scoring.target_response import answer_limit, reading_accuracy


@dataclass(frozen=True)
class Knockout:
    """Character accuracies, means over the pages, 0 to 1.

    Attributes:
        n_heads: silenced heads, and all.
        n_pages: pages read, each time the same.
        none: with all heads.
        top: without the heads with the highest scores.
        random: without as many of the other heads, one figure for each draw.
    """

    n_heads: tuple[int, int]
    n_pages: int
    none: float
    top: float
    random: list[float]


def knockout(
    model: VisionLanguageModel,
    scores: HeadScores,
    pages: PageSource,
    *,
    question: str | None = None,
    share: float = 0.05,
    n_draws: int = 5,
    seed: int = 0,
    max_new_tokens: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Knockout:
    """Read the same pages with all heads, without the top `share`, and without random others.

    Random heads are drawn from outside the top.

    Args:
        question: the question; None: the page source's.
        share: of the query heads, above 0, at most 0.5.
        n_draws: random choices of heads, each from `seed` + its number.

    Raises:
        SparseMMError: the scores are not those of this model, or an argument is out of range.
    """
    scores.check_fits(model.n_layer, model.n_head, model.n_head_kv)
    if not 0 < share <= 0.5:
        raise SparseMMError(f"the share of heads is {share}: it must be above 0 and at most 0.5")
    top = top_heads(scores.scores, share)
    rest = np.setdiff1d(np.arange(scores.scores.size), top)
    draws = [np.random.default_rng(seed + i).choice(rest, len(top), replace=False) for i in range(n_draws)]
    choices = [np.empty(0, np.intp), top, *draws]
    total = np.zeros(len(choices))
    for i in range(pages.n_pages):
        page = pages.page(i)
        prompt = model.prompt(question or pages.prompt, page.image)
        limit = max_new_tokens or answer_limit(model, page)
        for j, heads in enumerate(choices):
            with silenced(model, heads):
                total[j] += reading_accuracy(model.decode(model.answer(prompt, limit)), page)
            progress(i * len(choices) + j + 1, pages.n_pages * len(choices))
    means = [float(value) for value in total / pages.n_pages]
    return Knockout((len(top), scores.scores.size), pages.n_pages, means[0], means[1], means[2:])


@contextmanager
def silenced(model: VisionLanguageModel, heads: npt.NDArray[np.intp]) -> Iterator[None]:
    """Context manager in which these query heads contribute nothing.

    Args:
        heads: flat indices, layer * n_head + head.
    """
    with ExitStack() as hooks:
        for il, attention in enumerate(model.attentions):
            chosen = torch.as_tensor(heads[heads // model.n_head == il] % model.n_head)

            def hook(
                module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], chosen: torch.Tensor = chosen
            ) -> tuple[torch.Tensor, ...]:
                # the projection's input holds the heads' outputs side by side
                outputs = arguments[0].clone()
                outputs.unflatten(-1, (model.n_head, -1))[..., chosen.to(outputs.device), :] = 0
                return (outputs, *arguments[1:])

            if len(chosen):
                hooks.enter_context(attention.o_proj.register_forward_pre_hook(hook))
        yield
