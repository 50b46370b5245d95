"""`sparsemm-edge demo`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge.commands.output import print_json


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page, the model files and the head map.")] = Path(
        "sparsemm-demo"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Read a rendered page with the full cache and with eviction, side by side.

    \b
    Example:
      sparsemm-edge demo
    """
    from sparsemm_edge.demo import run, show

    report = run(out)
    if as_json:
        print_json(report)
    else:
        show(report)
