"""Input of chat: typed, pasted or piped messages, and Ctrl-C."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from prompt_toolkit import PromptSession

_QUOTES = '"""'
_HINT = "Ctrl-D or /exit leaves the chat"


class Messages:
    """Reads messages from a terminal, with editing, history and multi-line pastes, or from a pipe.

    A message is a line, or the lines between three quotes. Ctrl-C stops the current answer, which stays in
    the conversation. Ctrl-D leaves; with piped messages, Ctrl-C twice.

        messages = Messages()
        with messages() as lines:
            for line in lines:
                with messages.answering() as interrupted: ...
    """

    def __init__(self) -> None:
        self.from_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._answering = False
        self._interrupted = False

    @contextmanager
    def __call__(self) -> Iterator[Iterator[str]]:
        """Iterate over messages, stripped of white space."""
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield self._messages(PromptSession[str]().prompt if self.from_terminal else _piped_line)
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """Whether Ctrl-C was pressed while a message is answered."""
        self._answering, self._interrupted = True, False
        try:
            yield lambda: self._interrupted
        finally:
            self._answering = self._interrupted = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted and not self._answering and not self.from_terminal:
            raise KeyboardInterrupt
        self._interrupted = True
        if not self._answering:
            print(_HINT if self.from_terminal else "Ctrl-C again leaves the chat", file=sys.stderr)

    def _messages(self, line: Callable[[str], str]) -> Iterator[str]:
        with suppress(EOFError):
            while True:
                try:
                    message = line("> ")
                    if message.lstrip().startswith(_QUOTES):
                        message = _quoted(message.lstrip(), line)
                except KeyboardInterrupt:
                    if not self.from_terminal:
                        raise
                    print(_HINT, file=sys.stderr)
                    continue
                self._interrupted = False
                yield message.strip()
        if self.from_terminal:
            print()


def _quoted(message: str, line: Callable[[str], str]) -> str:
    """The text between three quotes; the end of the input ends it too."""
    text = message.removeprefix(_QUOTES)
    with suppress(EOFError):
        while not text.rstrip().endswith(_QUOTES):
            text += "\n" + line("... ")
    return text.rstrip().removesuffix(_QUOTES)


def _piped_line(_: str) -> str:
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line.removesuffix("\n")
