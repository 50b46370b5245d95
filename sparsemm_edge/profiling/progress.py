"""Progress messages on stderr."""

from rich.status import Status

from sparsemm_edge.closing import Closing
from sparsemm_edge.output import console


class Progress(Closing):
    """A status line, on terminals only, and a line for each finished step."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._status = Status("", console=self._console)
        self._status.start()

    def close(self) -> None:
        self._status.stop()

    def doing(self, what: str) -> None:
        self._status.update(what)

    def done(self, what: str) -> None:
        self._console.print(what, soft_wrap=True)
