"""`sparsemm-edge chat`."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from sparsemm_edge import defaults
from sparsemm_edge.commands import options
from sparsemm_edge.errors import SparseMMError

if TYPE_CHECKING:
    from sparsemm_edge.runtime import Conversation

_HELP = """\
/image PATH   show this image with the next message; may be given several times
/stats        what the KV cache holds and takes, and how long the last answer took
/reset        begin anew, without what was said
/help         these lines
/exit         leave, as does the end of the input
Ctrl-C        end the answer that is being given"""


@options.grouped
def chat(
    loaded: options.Loaded,
    sampled: options.Sampled,
    framed: options.Framed,
    evicted: options.Evicted,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Image for the first message, a file or a URL; may be given several times."),
    ] = None,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Most tokens of an answer.")] = 512,
    n_ctx: Annotated[
        int | None,
        typer.Option(
            "--n-ctx",
            "-c",
            help=f"Most positions of the whole chat [default: {defaults.N_CTX}, or what the model was"
            " trained for if that is less].",
        ),
    ] = None,
    n_ubatch: Annotated[
        int | None, typer.Option(help="Prompt tokens computed at a time [default: all of the first message].")
    ] = None,
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    verbose: options.Verbose = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print text and figures of each answer as one JSON object a line.")
    ] = False,
) -> None:
    """Talk about images. A message is a line; what was read once is not read again.

    Every message that leaves a head above its budget evicts again. /help lists the commands.

    \b
    Examples:
      sparsemm-edge chat -m llava.sparsemm.gguf --mmproj mmproj.gguf --image page.png
      echo "What is written here?" | sparsemm-edge chat -m llava.sparsemm.gguf --mmproj mm.gguf --image a.png
    """
    from sparsemm_edge.files import pasted_path
    from sparsemm_edge.image_urls import is_url, open_image
    from sparsemm_edge.runtime import Cancelled, Conversation

    frame = framed.arguments()
    sampling = sampled.sampling()
    images = [open_image(each) for each in image or []]
    with (
        loaded.load(show_log=verbose) as model,
        Conversation(
            model,
            n_ctx=min(model.n_ctx_train, defaults.N_CTX) if n_ctx is None else n_ctx,
            n_ubatch=n_ubatch,
            cache_type_k=cache_type_k,
            cache_type_v=cache_type_v,
            **frame,
            eviction=evicted.eviction(),
        ) as conversation,
    ):
        for line in _lines():
            command, _, rest = line.partition(" ")
            try:
                if command == "/exit":
                    break
                if command == "/help":
                    print(_HELP)
                elif command == "/reset":
                    conversation.close()
                    images.clear()
                elif command == "/stats":
                    print(_figures(conversation))
                elif command == "/image":
                    images.append(open_image(rest if is_url(rest) else pasted_path(rest)))
                elif command.startswith("/"):
                    raise SparseMMError(f"there is no command {command}; /help lists them")
                elif line:
                    text = ""
                    with _interrupts() as seen:
                        for piece in conversation.ask(
                            line,
                            images,
                            n_predict=n_predict,
                            sampling=sampling,
                            cancelled=partial(bool, seen),
                        ):
                            text += piece
                            if not as_json:
                                print(piece, end="", flush=True)
                            if seen:
                                break
                    print(json.dumps(conversation.stats().figures(text)) if as_json else "")
                    images.clear()
            except SparseMMError as error:
                print(f"error: {error}", file=sys.stderr)
            except Cancelled:
                print("the message was not read to its end, and is not part of the chat", file=sys.stderr)


def _lines() -> Iterator[str]:
    """What the user types, a line at a time, until the end of the input or Ctrl-C."""
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        import readline  # noqa: F401  (input() then edits lines)

        print("A message is a line; /image PATH shows an image with it; /help lists the commands.")
    while True:
        try:
            yield input("> " if asks else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C puts something into, instead of ending the program."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _figures(conversation: "Conversation") -> str:
    """What `/stats` prints."""
    stats = conversation.stats()
    kv, timings = stats.kv, stats.timings
    per_token = timings.decode_ms_per_token
    return "\n".join(
        (
            f"positions    {kv.n_positions} of {conversation.n_ctx};"
            f" a head holds {kv.positions_kept_mean:.0f} on average; {kv.n_evictions} evictions",
            f"KV cache     {kv.bytes_now / 2**20:.1f} MiB, {kv.bytes_peak / 2**20:.1f} MiB at most,"
            f" {kv.bytes_full / 2**20:.1f} MiB unevicted",
            f"last answer  {stats.n_prompt} positions read in {timings.image_ms + timings.prompt_ms:.0f} ms,"
            f" {stats.n_generated} generated"
            + (f" at {per_token:.1f} ms each" if per_token is not None else ""),
        )
    )
