"""`sparsemm-edge convert`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge import defaults
from sparsemm_edge.commands import options
from sparsemm_edge.commands.output import print_figures, print_json, progress_bar


def convert(
    model: Annotated[Path, typer.Argument(help="The text model, a GGUF file.", show_default=False)],
    scores: Annotated[Path, typer.Option(help="Head scores of this model, a JSON file.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="File to write [default: <model>.sparsemm.gguf beside the model].")
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Positions a KV head keeps on average, window included.")
    ] = defaults.BUDGET,
    window: Annotated[
        int | None,
        typer.Option(
            help="Last prompt positions, which vote and are always kept"
            f" [default: {defaults.WINDOW}, at most a quarter of the budget]."
        ),
    ] = None,
    floor_ratio: Annotated[
        float, typer.Option(help="Share of the budget that every head gets.")
    ] = defaults.FLOOR_RATIO,
    policy: Annotated[
        str, typer.Option(help="How heads share: sparsemm, uniform, pyramid or random.")
    ] = "sparsemm",
    vote: Annotated[
        str, typer.Option(help="How a head's positions are ranked: mixkv, or snapkv (as in the paper).")
    ] = defaults.VOTE,
    residual: Annotated[
        bool,
        typer.Option(
            "--residual/--no-residual", help="One place of a head that evicts stands for all that it lost."
        ),
    ] = defaults.RESIDUAL,
    water_fill: Annotated[
        bool,
        typer.Option("--water-fill/--no-water-fill", help="Give what a head cannot use to the others."),
    ] = True,
    n_prompt: Annotated[int, typer.Option(help="Prompt length to water-fill for, in positions.")] = 2944,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of policy random.")] = 0,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write head budgets into a copy of a GGUF model.

    Stock llama.cpp loads the copy too and ignores them. Converting a converted file replaces its budgets.

    \b
    Example:
      sparsemm-edge convert llava-7b.gguf --scores llava-7b.head-scores.json --budget 256
    """
    from sparsemm_edge.convert import convert as convert_model
    from sparsemm_edge.inspection import figures

    with progress_bar("copying", of_bytes=True) as progress:
        done = convert_model(
            model,
            scores,
            out,
            budget=budget,
            window=window,
            floor_ratio=floor_ratio,
            policy=policy,
            vote=vote,
            residual=residual,
            water_fill=water_fill,
            n_prompt=n_prompt,
            seed=seed,
            force=force,
            progress=progress,
        )
    report = figures(done.shape, done.metadata)
    if as_json:
        print_json({"path": str(done.path), "sparsemm": report})
    else:
        print(f"wrote {done.path}")
        print_figures(report)
