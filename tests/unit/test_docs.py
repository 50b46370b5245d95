"""The Python examples in the documentation do what the text beside them says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.model_files import random_scores
from helpers.models import sample_image, test_model
from helpers.paths import ROOT
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.convert import convert
from sparsemm_edge.policies import POLICIES
from sparsemm_edge.runtime import VisionModel, generate


def example(page: str, heading: str) -> str:
    """The first Python block under a heading."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"^## {heading}$.*?^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_new_policy_of_the_example_gives_later_layers_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "late", POLICIES["uniform"])  # so that it is gone afterwards
    names: dict[str, object] = {}
    exec(example("development.md", "A new policy"), names)
    first, last = map(int, capsys.readouterr().out.split())
    table = names["table"]
    assert (table[0, 0], table[31, 0]) == (first, last)  # type: ignore[index]
    assert table.mean() == 64  # type: ignore[attr-defined]
    assert (table[1:] >= table[:-1]).all() and last > 2 * first  # type: ignore[index]


def test_step_by_step_is_what_generate_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = test_model("llava")
    monkeypatch.chdir(tmp_path)
    scores = random_scores(files.gguf(), tmp_path)
    convert(files.gguf(), scores, Path("model.sparsemm.gguf"), spec=BudgetSpec(budget=40, window=8))
    Path("mmproj.gguf").symlink_to(files.mmproj())
    sample_image(files.image_size, 1).save("page.png")
    names: dict[str, object] = {}
    exec(example("development.md", "Step by step"), names)
    stats, _, text = capsys.readouterr().out.partition("\n")
    with VisionModel.load("model.sparsemm.gguf", "mmproj.gguf") as model:
        answer = generate(model, "What does the page say?", ["page.png"], n_predict=32)
        assert "".join(answer).strip() == text.strip()
        assert "positions a head" in stats
        assert list(answer.stats().tokens) == names["tokens"]
