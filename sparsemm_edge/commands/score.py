"""`sparsemm-edge score`."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsemm_edge.commands import options
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.output import print_json, progress_bar

if TYPE_CHECKING:
    from sparsemm_edge.scoring.run import ScoringJob, ScoringResult


def score(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file; or the folder of a Hugging Face checkpoint, or a hub id to download.",
            show_default=False,
        ),
    ],
    mmproj: Annotated[Path | None, typer.Option(help="A GGUF file's image encoder, a GGUF file.")] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("scores.json"),
    data: Annotated[
        str,
        typer.Option(
            help="Pages: documents to read or scenes to tell of (made here), grid (for the demo model),"
            " or a folder with images and a JSON, JSON Lines or Parquet file of chunks and boxes."
        ),
    ] = "documents",
    pages: Annotated[int, typer.Option(help="How many pages, at most.")] = 100,
    until: Annotated[
        float,
        typer.Option(help="Stop at this rank correlation between halves of the pages; 2: never."),
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of the pages.")] = 0,
    size: options.PageSize = "896x672",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What to ask about a page [default: for all its text]. With the model's image token in it:"
            " the whole prompt, without the chat template."
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Also write head budgets into a copy of the GGUF file.")
    ] = False,
    threads: options.Threads = None,
    threads_batch: options.ThreadsBatch = None,
    n_gpu_layers: options.NGpuLayers = None,
    image_min_tokens: options.ImageMinTokens = None,
    image_max_tokens: options.ImageMaxTokens = None,
    chat_template: options.ChatTemplate = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Of a checkpoint: cpu, cuda, cuda:1, mps, or auto: over all devices (needs accelerate)"
            " [default: the GPU if there is one]."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Data type of a checkpoint: auto (the checkpoint's own), float32, float16 or bfloat16."
        ),
    ] = "auto",
    jobs: Annotated[int, typer.Option(help="Processes, each with the model; the i-th takes GPU i.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an unfinished run.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file to write, drop an unfinished run.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Score the attention heads of a vision-language model by how much they look at what is being read.

    A GGUF file is scored as llama.cpp runs it, without torch. So are checkpoints of LLaVA-1.5, LLaVA-NeXT,
    LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, Idefics3 and SmolVLM, with torch; a folder is
    read without the network. Progress is saved beside the output.

    \b
    Examples:
      sparsemm-edge score llava-7b-q4_0.gguf --mmproj mmproj.gguf --convert
      sparsemm-edge score llava-hf/llava-1.5-7b-hf --out llava.scores.json --dtype bfloat16
      sparsemm-edge score path/to/checkpoint --data my-pages --pages 300 --jobs 2
    """
    from sparsemm_edge.commands.scores import print_figures, to_dict
    from sparsemm_edge.convert import check_out
    from sparsemm_edge.convert import convert as convert_model
    from sparsemm_edge.pages.readers import page_size
    from sparsemm_edge.scoring.run import ScoringJob
    from sparsemm_edge.scoring.sources import Checkpoint, GgufFiles, Source

    source: Source
    if Path(model).suffix.lower() == ".gguf" or Path(model).is_file():
        if mmproj is None:
            raise SparseMMError(f"{model}: heads are scored on images: give its image encoder with --mmproj")
        if device is not None or dtype != "auto":
            raise SparseMMError(f"{model}: --device and --dtype are for checkpoints, a GGUF file takes -ngl")

        source = GgufFiles(
            Path(model),
            mmproj,
            n_threads=threads,
            n_threads_batch=threads_batch,
            n_gpu_layers=n_gpu_layers,
            image_min_tokens=image_min_tokens,
            image_max_tokens=image_max_tokens,
            chat_template=options.template_text(chat_template),
        )
        if convert:  # known before the pages are read
            check_out(Path(model), None, force=force)
    else:
        if mmproj is not None or convert:
            raise SparseMMError(f"{model}: --mmproj and --convert are for GGUF files")
        source = Checkpoint(model, device, dtype)
    job = ScoringJob(source, data, pages, seed, page_size(size), prompt, max_new_tokens, until)
    report = run(job, out, n_jobs=jobs, resume=resume, force=force)
    converted = None
    if convert:
        with progress_bar("copying", of_bytes=True) as progress:
            converted = convert_model(Path(model), out, force=force, progress=progress).path
    if as_json:
        print_json(
            {
                "path": str(out),
                **({"converted": str(converted)} if converted else {}),
                **to_dict(report.scores),
                "unread": report.unread,
                "warnings": report.warnings,
            }
        )
        return
    print(f"wrote {out}" + (f" and {converted}" if converted else ""))
    print_figures(report.scores)
    if report.unread:
        print(f"pages of which the answer names nothing: {', '.join(report.unread)}")


def run(
    job: "ScoringJob", out: Path, *, n_jobs: int = 1, resume: bool = False, force: bool = False
) -> "ScoringResult":
    """scoring.run.score with a progress bar, warnings and an estimate of the time after the first page."""
    from sparsemm_edge.scoring.run import score as score_heads

    with progress_bar("reading pages") as shown:
        started: list[tuple[float, int]] = []

        def progress(done: int, total: int) -> None:
            now = time.monotonic()
            if not started:
                started.append((now, done))
            elif done == started[0][1] + 1 < total:
                each = (now - started[0][0]) / n_jobs
                print(
                    f"about {_duration(each)} a page, {_duration(each * (total - done))} for all {total},"
                    " less if the ranking settles before; what is done is kept if you stop it",
                    file=sys.stderr,
                )
            shown(done, total)

        report = score_heads(job, out, n_jobs=n_jobs, resume=resume, force=force, progress=progress)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return report


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
