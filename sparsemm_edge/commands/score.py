"""`sparsemm-edge score`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge.commands import options
from sparsemm_edge.commands.output import print_json, progress_bar


def score(
    model: Annotated[
        str,
        typer.Argument(
            metavar="HF_MODEL",
            help="Folder of a Hugging Face checkpoint, or a hub id to download.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("scores.json"),
    data: Annotated[
        str,
        typer.Option(
            help="Pages to read: documents (made here), grid (what the demo model reads), or a folder with"
            " images and a JSON, JSON Lines or Parquet file of chunks and boxes."
        ),
    ] = "documents",
    pages: Annotated[int, typer.Option(help="How many pages, at most.")] = 100,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Which pages are made.")] = 0,
    size: Annotated[str, typer.Option("--page-size", help="Of documents, in pixels.")] = "896x672",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What to ask about a page [default: for all its text]. With the model's image token in it:"
            " the whole prompt, without the chat template."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer [default: twice what the page's text takes].")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, mps, or auto: over all devices (needs accelerate)"
            " [default: the GPU if there is one]."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's own), float32, float16 or bfloat16.")
    ] = "auto",
    jobs: Annotated[int, typer.Option(help="Processes, each with the model; the i-th takes GPU i.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file to write, drop an unfinished run.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Score the attention heads of a vision-language model: which of them look at what is being read.

    LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, Idefics3 and SmolVLM
    checkpoints. A folder is read without the network. What is done is saved beside the output now and then.

    \b
    Examples:
      sparsemm-edge score llava-hf/llava-1.5-7b-hf --out llava.scores.json --dtype bfloat16
      sparsemm-edge score path/to/checkpoint --data my-pages --pages 300 --jobs 2
    """
    from sparsemm_edge.commands.scores import figures, print_convergence, print_figures
    from sparsemm_edge.extras import needs_torch
    from sparsemm_edge.pages.readers import page_size

    with needs_torch():
        from sparsemm_edge.scoring.run import Job
        from sparsemm_edge.scoring.run import score as score_heads

    job = Job(model, data, pages, seed, page_size(size), prompt, max_new_tokens, device, dtype)
    with progress_bar("reading pages") as progress:
        report = score_heads(
            job,
            out,
            n_jobs=jobs,
            resume=resume,
            force=force,
            progress=progress,
        )
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print_json(
            {
                "path": str(out),
                **figures(report.scores),
                "unread": report.unread,
                "warnings": report.warnings,
            }
        )
        return
    print(f"wrote {out}")
    print_figures(report.scores)
    print_convergence(report.scores)
    if report.unread:
        print(f"pages of which the answer names nothing: {', '.join(report.unread)}")
