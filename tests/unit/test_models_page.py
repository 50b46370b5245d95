"""docs/models.md is true: the architectures, what is refused and why, the bytes that `fit` counts."""

from __future__ import annotations

import re

import models_table
from helpers.paths import ROOT
from sparsemm_edge.gguf_metadata import REFUSED_ARCHITECTURES, SUPPORTED_ARCHITECTURES

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its two lines of heading."""
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return found[2:]


def test_every_architecture_that_convert_takes_has_a_row() -> None:
    named = [name for row in rows(section("What is supported")) for name in re.findall(r"`(\S+?)`", row[0])]
    assert sorted(named) == sorted(SUPPORTED_ARCHITECTURES)


def test_what_is_refused_has_the_reason_of_the_error_line() -> None:
    assert {row[0].strip("`"): row[2] for row in rows(section("What is refused"))} == REFUSED_ARCHITECTURES


def test_bytes_are_those_that_fit_computes() -> None:
    """Else: python scripts/models_table.py"""
    for table in models_table.tables():
        assert table in section("What eviction gives")
