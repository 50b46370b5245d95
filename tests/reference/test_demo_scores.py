"""The demo model's scores say which heads read: few hold most of it, and without them it cannot read."""

import numpy as np
import pytest
import torch

from helpers.paths import ROOT
from sparsemm_edge.pages.readers import open_pages
from sparsemm_edge.ranking import held_by_top, spearman, top_heads
from sparsemm_edge.scores import HeadScores
from sparsemm_edge.scoring.knockout import knockout
from sparsemm_edge.scoring.models import VisionLanguageModel, load
from sparsemm_edge.scoring.target_response import score_page

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return load(str(ROOT / "models" / "demo"), device="cpu")


@pytest.fixture(scope="module")
def published() -> HeadScores:
    return HeadScores.load(ROOT / "scores" / "demo.json")


def test_the_published_scores_are_of_this_model(model: VisionLanguageModel, published: HeadScores) -> None:
    published.check_fits(model.n_layer, model.n_head, model.n_head_kv)
    assert published.provenance["n_pages"] >= 100
    assert published.provenance["character_accuracy"] > 0.9
    assert held_by_top(published.scores, 0.2) > 0.5


def test_a_few_other_pages_name_the_same_heads(model: VisionLanguageModel, published: HeadScores) -> None:
    pages = open_pages("grid", 12, seed=5)
    results = [score_page(model, pages.page(i), pages.prompt) for i in range(pages.n_pages)]
    table = np.mean([result.scores for result in results], axis=0)
    assert sum(result.n_scored for result in results) > 100
    assert np.mean([result.accuracy for result in results]) > 0.9
    assert spearman(table, published.scores) > 0.6
    assert set(top_heads(table, 0.03)) <= set(top_heads(published.scores, 0.1))


def test_without_the_top_heads_it_cannot_read_without_others_it_can(
    model: VisionLanguageModel, published: HeadScores
) -> None:
    """Issue 5's experiment on a few pages: `sparsemm-edge scores knockout` is the whole of it."""
    result = knockout(model, published, open_pages("grid", 3, seed=1), n_draws=3)
    assert result.none > 0.9
    assert result.top < result.none / 2
    assert np.mean(result.random) > result.none / 2
