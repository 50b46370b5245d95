"""`sparsemm-edge demo`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge.commands import options
from sparsemm_edge.output import print_json, whole_numbers


def demo(
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", "-s", help="The page to draw, 0 to 999999 [default: a new one].", show_default=False
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Your own picture instead of a page; it is resized to 336 x 336.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="A question instead of the demo's own.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Mean positions per KV head.")] = "64,32",
    out: Annotated[Path, typer.Option(help="Folder for the page and the pictures.")] = Path("sparsemm-demo"),
    as_json: options.AsJson = False,
) -> None:
    """Run a small bundled model with and without eviction, and show the answers side by side.

    Budgets are distributed over the heads by score; the first one also evenly, for comparison.

    \b
    Examples:
      sparsemm-edge demo
      sparsemm-edge demo --seed 7 --budgets 128,48
    """
    from sparsemm_edge.demo import run, show

    wanted = whole_numbers("--budgets", budgets)
    report = run(out, seed=seed, image=image, prompt=prompt, budgets=wanted)
    if as_json:
        print_json(report.to_dict())
    else:
        show(report)
