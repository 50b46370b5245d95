"""`sparsemm-edge convert`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge import defaults
from sparsemm_edge.commands import options
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.output import print_figures, print_json, progress_bar


def convert(
    model: Annotated[Path, typer.Argument(help="The text model, a GGUF file.")],
    scores: Annotated[
        Path,
        typer.Option(
            help="Head scores of this model, a JSON file; auto: <model>.scores.json beside the model,"
            " made if it is not there."
        ),
    ],
    mmproj: Annotated[
        Path | None, typer.Option(help="The model's image encoder, a GGUF file: for --scores auto.")
    ] = None,
    data: Annotated[str, typer.Option(help="Pages for --scores auto, as score takes them.")] = "documents",
    threads: options.Threads = None,
    threads_batch: options.ThreadsBatch = None,
    chat_template: options.ChatTemplate = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write [default: <model>.sparsemm.gguf beside the model].")
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Mean positions per KV head, window included.")
    ] = defaults.BUDGET,
    window: Annotated[
        int | None,
        typer.Option(
            help="Observation window: last prompt positions, which are always kept"
            f" [default: {defaults.WINDOW}, at most a quarter of the budget]."
        ),
    ] = None,
    floor_ratio: Annotated[
        float, typer.Option(help="Share of the budget that is divided evenly.")
    ] = defaults.FLOOR_RATIO,
    policy: Annotated[
        str, typer.Option(help="How heads share the budget: sparsemm, uniform, pyramid or random.")
    ] = "sparsemm",
    vote: Annotated[
        str, typer.Option(help="How positions are ranked: mixkv, or snapkv (as in the paper).")
    ] = defaults.VOTE,
    residual: Annotated[
        bool, typer.Option(help="Keep one residual slot per evicting head, which summarises what it evicted.")
    ] = defaults.RESIDUAL,
    water_fill: Annotated[
        bool, typer.Option(help="Redistribute what a head cannot use to the other heads.")
    ] = True,
    n_prompt: Annotated[int, typer.Option(help="Prompt length to water-fill for, in positions.")] = 2944,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of policy random.")] = 0,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write head budgets into a copy of a GGUF model.

    Stock llama.cpp loads the copy too and ignores them. Converting a converted file replaces its budgets.

    \b
    Examples:
      sparsemm-edge convert llava-7b.gguf --scores llava-7b.head-scores.json --budget 256
      sparsemm-edge convert llava-7b.gguf --scores auto --mmproj mmproj.gguf
    """
    from sparsemm_edge.budgets import BudgetSpec
    from sparsemm_edge.convert import check_out
    from sparsemm_edge.convert import convert as convert_model
    from sparsemm_edge.inspection import to_dict

    spec = BudgetSpec().override(
        policy=policy,
        budget=budget,
        window=window,
        floor_ratio=floor_ratio,
        vote=vote,
        residual=residual,
        water_fill=water_fill,
        seed=seed,
    )
    if str(scores) == "auto":
        check_out(model, out, force=force)  # known before the pages are read
        scores = _score(model, mmproj, data, chat_template, n_threads=threads, n_threads_batch=threads_batch)
    with progress_bar("copying", of_bytes=True) as progress:
        done = convert_model(
            model,
            scores,
            out,
            spec=spec,
            n_prompt=n_prompt,
            force=force,
            progress=progress,
        )
    report = to_dict(done.shape, done.metadata)
    if as_json:
        print_json({"path": str(done.path), "sparsemm": report})
    else:
        print(f"wrote {done.path}")
        print_figures(report)


def _score(
    model: Path, mmproj: Path | None, data: str, chat_template: str | None, **threads: int | None
) -> Path:
    """The file of the model's scores beside it; made, or gone on with, if it is not there."""
    from sparsemm_edge.commands.score import run
    from sparsemm_edge.pages.documents import SIZE
    from sparsemm_edge.scoring.run import ScoringJob
    from sparsemm_edge.scoring.sources import GgufFiles

    path = model.with_name(f"{model.stem}.scores.json")
    if path.exists():
        print(f"note: scores of an earlier run are used: {path}", file=sys.stderr)
        return path
    if mmproj is None:
        raise SparseMMError("--scores auto reads pages: give the model's image encoder with --mmproj")
    source = GgufFiles(model, mmproj, **threads, chat_template=options.template_text(chat_template))
    job = ScoringJob(source, data, 100, 0, SIZE, None, None)
    run(job, path, resume=path.with_name(f"{path.name}.partial").exists())
    return path
