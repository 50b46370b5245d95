"""The command line: sparsemm-edge COMMAND. The commands are in commands/."""

import io
import logging
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from sparsemm_edge.commands.bench import bench
from sparsemm_edge.commands.chat import chat
from sparsemm_edge.commands.convert import convert
from sparsemm_edge.commands.demo import demo
from sparsemm_edge.commands.eval import evaluate
from sparsemm_edge.commands.fit import fit
from sparsemm_edge.commands.generate import generate
from sparsemm_edge.commands.inspect import inspect
from sparsemm_edge.commands.kept import kept
from sparsemm_edge.commands.mmproj import mmproj
from sparsemm_edge.commands.options import as_command
from sparsemm_edge.commands.profile import profile
from sparsemm_edge.commands.score import score
from sparsemm_edge.commands.scores import scores
from sparsemm_edge.commands.serve import serve
from sparsemm_edge.errors import SparseMMError

_UsageError: Any = typer.BadParameter.__bases__[0]  # typer has no name of its own for it

# Rich's boxes would break a one-line error into a picture, and help texts hold examples to be copied.
app = typer.Typer(
    name="sparsemm-edge",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from sparsemm_edge.versions import versions

        print("\n".join(versions()))
        raise typer.Exit()


@app.callback()
def _app(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print what is installed, and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Visual-head KV-cache eviction for llama.cpp: same answers about images, a fraction of the cache."""


for _command in (score, convert, mmproj, inspect, generate, chat, serve, fit, profile, bench, kept, demo):
    app.command()(as_command(_command))
app.command("eval")(as_command(evaluate))
app.add_typer(scores, name="scores")


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Run the command line. A user's mistake becomes one line on stderr and exit status 2.

    SIGTERM is handled like Ctrl-C, so that no process and no partial file is left: exit status 143.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    _take_any_text()
    notes = logging.StreamHandler(sys.stderr)
    notes.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("sparsemm_edge")
    logger.addHandler(notes)
    try:
        status = app(standalone_mode=False)  # typer's own errors are pictures of several lines
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except SparseMMError as error:
        _refuse(str(error))
    except _UsageError as error:
        message = error.format_message()
        if "\n" in message:  # a command without arguments: its help
            print(message, file=sys.stderr)
            sys.exit(2)
        _refuse(f"{message} ({error.ctx.command_path} --help)" if error.ctx else message)
    except typer.Abort:
        sys.exit(1)
    except OSError as error:  # other file errors are reported where they happen
        where = f"{error.filename}" if error.filename is not None else "the output"
        _leave_stdout()
        _refuse(f"cannot use {where}: {error.strerror or error}")
    finally:
        logger.removeHandler(notes)
        signal.signal(signal.SIGTERM, before)


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


def _take_any_text() -> None:
    """Print replacement characters where the terminal's encoding lacks one, and accept non-text bytes.

    Such bytes, and those of arguments, are refused where text is needed (files.check_text).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "strict":
        sys.stdin.reconfigure(errors="surrogateescape")


def _leave_stdout() -> None:
    """Discard further output: after a full disk or a closed pipe, writing would fail again at exit."""
    with suppress(OSError, ValueError):  # which is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
