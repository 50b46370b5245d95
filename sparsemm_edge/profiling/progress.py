"""Progress messages on stderr."""

from collections.abc import Callable

from rich.status import Status

from sparsemm_edge.closing import Closing
from sparsemm_edge.output import console
from sparsemm_edge.profiling.jobs import Event


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

    def phases(self, before: str) -> Callable[[Event], None]:
        """What shows the phases of a worker as they begin, each with this text before it."""

        def listen(event: Event) -> None:
            if event["event"] == "phase":
                self.doing(before + event["name"])

        return listen

    def done(self, what: str) -> None:
        self._console.print(what, soft_wrap=True)
