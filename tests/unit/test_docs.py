"""The Python examples in the documentation do what the text beside them says."""

from __future__ import annotations

import re

import pytest

from helpers.paths import ROOT
from sparsemm_edge.policies import POLICIES


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
