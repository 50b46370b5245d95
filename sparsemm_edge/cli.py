"""The command line: sparsemm-edge COMMAND. The commands are in commands/."""

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from sparsemm_edge import __version__
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
from sparsemm_edge.commands.profile import profile
from sparsemm_edge.commands.score import score
from sparsemm_edge.commands.scores import scores
from sparsemm_edge.errors import SparseMMError

# Rich's boxes would break a one-line error into a picture, and help texts hold examples to be copied.
app = typer.Typer(
    name="sparsemm-edge",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparsemm-edge {__version__}")
        raise typer.Exit()


@app.callback()
def _app(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Visual-head KV-cache eviction for llama.cpp: same answers about images, a fraction of the cache."""


for _command in (score, convert, mmproj, inspect, generate, chat, fit, profile, bench, kept, demo):
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(scores, name="scores")


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Run the command line. A user's mistake becomes one line on stderr and exit status 2.

    SIGTERM ends it as Ctrl-C does, so that no process and no half-written file is left: exit status 143.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except SparseMMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
