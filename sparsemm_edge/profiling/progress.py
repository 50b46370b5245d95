"""Progress messages on stderr."""

import sys
from types import TracebackType

from rich.console import Console
from rich.status import Status


class Progress:
    """A status line, on terminals only, and a line for each finished step."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._status = Status("", console=self._console)

    def __enter__(self) -> "Progress":
        self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()

    def doing(self, what: str) -> None:
        self._status.update(what)

    def done(self, what: str) -> None:
        self._console.print(what, markup=False, soft_wrap=True)
