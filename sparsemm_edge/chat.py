"""A chat about images in the terminal, with slash commands."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from sparsemm_edge.closing import Closing
from sparsemm_edge.errors import ContextFullError, SparseMMError
from sparsemm_edge.files import check_text, pasted_path, read_text
from sparsemm_edge.image_urls import is_url, open_image
from sparsemm_edge.runtime import Cancelled, Conversation, Sampling
from sparsemm_edge.typed import Messages

HELP = """\
/image PATH    show this image, a file or a URL, with the next message; may be given several times
/system TEXT   begin anew, and tell the model this before everything; or @FILE
/retry, /regen answer the last message again, with the next seed
/stats         what the KV cache holds and takes, and how long the last answer took
/save FILE     write the conversation to a file
/load FILE     go on with such a conversation instead
/reset         begin anew, without what was said
/help          these lines
/exit          leave, as do /quit, /bye and the end of the input (Ctrl-D)
\"""            begins a message of several lines, which \""" ends; what is pasted at once is one message
Ctrl-C         end the answer that is being given"""

_LEAVE = ("/exit", "/quit", "/bye", "exit", "quit")


@dataclass
class Chat(Closing):
    """A conversation, and the images for the next message.

    Attributes:
        begin: makes a conversation: new with a system message, or from a file of Conversation.save.
        system: the system message.
        images: shown with the next message.
        sampling: how answers are sampled.
        n_predict: most tokens of an answer.
        as_json: print an answer and its figures as one JSON object.
    """

    begin: Callable[[str | None, Path | None], Conversation]
    system: str | None
    images: list[Image.Image]
    sampling: Sampling
    n_predict: int
    as_json: bool

    def __post_init__(self) -> None:
        self._messages = Messages()
        self._n_retries = 0
        self._conversation = self.begin(self.system, None)
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/system": self._tell,
            "/retry": self._retry,
            "/regen": self._retry,
            "/stats": lambda _: print(_figures(self._conversation)),
            "/save": self._save,
            "/load": self._load,
            "/reset": lambda _: self._replace(self.begin(self.system, None)),
            "/help": lambda _: print(HELP),
        }

    def close(self) -> None:
        self._conversation.close()

    def run(self) -> None:
        """Answer messages until the user leaves. Errors are printed as one line.

        Raises:
            SparseMMError: no message could be answered.
        """
        self._conversation.check(self.sampling)
        if self._messages.from_terminal:
            print("A message is a line; /image PATH shows an image with it; /help lists the commands.")
        with self._messages() as messages:
            for message in messages:
                if message in _LEAVE:
                    return
                try:
                    self._take(message)
                except ContextFullError as error:
                    print(f"error: {error}, and /reset begins anew", file=sys.stderr)
                except SparseMMError as error:
                    print(f"error: {error}", file=sys.stderr)
                except Cancelled:
                    print("the message was not read to its end, and is not part of the chat", file=sys.stderr)

    def _take(self, message: str) -> None:
        check_text(message, "the message")
        if message.startswith("/") and "\n" not in message:
            command, *rest = message.split(maxsplit=1)
            if command not in self._commands:
                raise SparseMMError(f"there is no command {command}; /help lists them")
            self._commands[command](rest[0] if rest else "")
        elif message or self.images:
            self._n_retries = 0
            with self._messages.answering() as interrupted:
                pieces = self._conversation.ask(
                    message,
                    self.images,
                    n_predict=self.n_predict,
                    sampling=self.sampling,
                    cancelled=interrupted,
                )
                self._show(pieces, interrupted)
            self.images.clear()

    def _show(self, pieces: Iterator[str], interrupted: Callable[[], bool]) -> None:
        """Stream an answer, until Ctrl-C."""
        text = ""
        for piece in pieces:
            text += piece
            if not self.as_json:
                print(piece, end="", flush=True)
            if interrupted():
                break
        print(json.dumps(self._conversation.stats().to_dict(text)) if self.as_json else "", flush=True)
        if self._conversation.is_full:
            print(
                f"the context of {self._conversation.n_ctx} positions is full: /reset begins anew,"
                " --n-ctx makes it larger",
                file=sys.stderr,
            )

    def _image(self, given: str) -> None:
        self.images.append(open_image(given if is_url(given) else pasted_path(given)))

    def _tell(self, text: str) -> None:
        if not text:
            print(self.system or "the model is told nothing before the first message")
            return
        system = read_text(pasted_path(text[1:])).strip() if text.startswith("@") else text
        self._replace(self.begin(system, None))
        self.system = system

    def _retry(self, _: str) -> None:
        self._n_retries += 1
        sampling = self.sampling
        if sampling.seed >= 0:
            sampling = replace(sampling, seed=sampling.seed + self._n_retries)
        with self._messages.answering() as interrupted:
            self._show(self._conversation.retry(n_predict=self.n_predict, sampling=sampling), interrupted)
        if sampling.temperature == 0:
            print("at --temp 0 the answer to a message is always the same", file=sys.stderr)

    def _save(self, given: str) -> None:
        path = _path(given, "/save")
        self._conversation.save(path)
        print(f"wrote {path}")

    def _load(self, given: str) -> None:
        self._replace(self.begin(None, _path(given, "/load")))

    def _replace(self, conversation: Conversation) -> None:
        self._conversation.close()
        self._conversation = conversation
        self.images.clear()


def _path(given: str, command: str) -> Path:
    if not given:
        raise SparseMMError(f"which file? {command} FILE")
    return pasted_path(given)


def _figures(conversation: Conversation) -> str:
    """What `/stats` prints."""
    stats = conversation.stats()
    kv, timings = stats.kv, stats.timings
    per_token = timings.decode_ms_per_token
    return "\n".join(
        (
            f"positions    {kv.n_positions} of {conversation.n_ctx};"
            f" a head holds {kv.positions_kept_mean:.0f} on average; {kv.n_evictions} evictions",
            f"KV cache     {kv.in_words()}; {kv.bytes_peak / 2**20:.1f} MiB at most",
            f"last answer  {stats.n_prompt} positions read in {timings.image_ms + timings.prompt_ms:.0f} ms,"
            f" {stats.n_generated} generated"
            + (f" at {per_token:.1f} ms each" if per_token is not None else ""),
        )
    )
