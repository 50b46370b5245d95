"""How a command ended; the fixture `sparsemm` runs one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple


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
