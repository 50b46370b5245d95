"""Fixtures that several test files share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest


class Done(NamedTuple):
    """How a command ended: its exit status, and what it wrote on stdout and stderr."""

    status: int
    out: str
    err: str

    @property
    def report(self) -> Any:
        """What a command with --json found: status 0, and stdout is one JSON value."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def refusal(self) -> str:
        """Why a command was refused: status 2, nothing on stdout, one line `error: ...` on stderr."""
        assert (self.status, self.out) == (2, ""), self
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line


CommandLine = Callable[..., Done]


@pytest.fixture
def sparsemm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """`sparsemm(*arguments)` runs the command line in this process.

    What llama.cpp writes past Python is captured too; the terminal is so wide that no table wraps.
    """
    from sparsemm_edge import cli

    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["sparsemm-edge", *map(str, arguments)])
        capfd.readouterr()  # what was written before is not the command's
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return Done(int(exit_.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def models() -> Callable[[str], object]:
    """`models(name)` is the test model of that name; the first use makes them all, in seconds."""
    from models import test_model  # imports torch: only for tests that want a model

    return test_model
