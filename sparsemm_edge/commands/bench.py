"""`sparsemm-edge bench`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge.commands import options
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.output import print_json, print_table, whole_numbers


def bench(
    model: Annotated[Path | None, typer.Option("--model", "-m", help="A text model, a GGUF file.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Instead of a model, random weights of this shape: llava-1.5-7b, llava-1.5-13b,"
            " llava-next-7b, llava-next-mistral-7b, qwen2-vl-2b, qwen2-vl-7b, qwen2.5-vl-3b,"
            " qwen2.5-vl-7b, qwen3-vl-2b, qwen3-vl-4b, qwen3-vl-8b, internvl3.5-8b, glm-4.1v-9b,"
            " smolvlm2-2.2b, qwen3.5-4b, qwen3.5-9b or gemma-3-4b."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Use only this many layers of the shape.")] = None,
    n_prompt: Annotated[str, typer.Option(help="Prompt lengths in positions.")] = "640,2944",
    budgets: Annotated[str, typer.Option(help="Budgets to evict to.")] = "64,256",
    scores: options.Scores = None,
    rounds: Annotated[
        int, typer.Option(help="Interleaved runs of each setting and prompt; 0: only memory.")
    ] = 2,
    n_ubatch: options.NUbatch = None,
    threads: options.Threads = None,
    threads_batch: options.ThreadsBatch = None,
    n_gpu_layers: options.NGpuLayers = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("sparsemm-bench"),
    as_json: options.AsJson = False,
) -> None:
    """Benchmark speed and memory over prompt lengths and budgets, against the full cache.

    A shape becomes a file of random Q4_0 weights in the user cache. Writes bench.json, a self-contained
    bench.html and PNG pictures into a folder.

    \b
    Examples:
      sparsemm-edge bench --shape llava-1.5-7b --layers 8 --n-prompt 640,2944 --budgets 64,256
      sparsemm-edge bench -m llava.sparsemm.gguf
    """
    from sparsemm_edge.profiling import shapes
    from sparsemm_edge.profiling.bench import bench as measure
    from sparsemm_edge.profiling.bench import check_memory
    from sparsemm_edge.profiling.machine import in_words
    from sparsemm_edge.profiling.progress import Progress
    from sparsemm_edge.reports import bench as bench_report
    from sparsemm_edge.reports import html
    from sparsemm_edge.runtime.loading import Loading

    lengths, wanted = whole_numbers("--n-prompt", n_prompt), whole_numbers("--budgets", budgets)
    if (model is None) == (shape is None):
        raise SparseMMError("bench needs a model: give one of -m MODEL.gguf and --shape NAME")
    if model is not None and layers is not None:
        raise SparseMMError("--layers cuts a --shape, not a model file")
    if not lengths or not wanted:
        raise SparseMMError("--n-prompt and --budgets must each name at least one")
    html.make_folder(out)
    with Progress() as progress:
        if shape is not None:
            wanted_shape = shapes.find_shape(shape, layers)
            check_memory(wanted_shape.weight_bytes())
            progress.doing(f"making {shape}")
            model = shapes.model_of_shape(
                shape,
                wanted_shape,
                shapes.cache_dir("bench-models"),
                lambda share: progress.doing(f"making {shape}: {share:.0%}"),
            )
        assert model is not None
        found = measure(
            model,
            lengths,
            wanted,
            progress,
            scores=scores,
            n_rounds=rounds,
            n_threads=threads,
            n_ubatch=n_ubatch,
            loading=Loading(n_threads_batch=threads_batch, n_gpu_layers=n_gpu_layers),
        )
    bench_report.write(out, found)
    if as_json:
        print_json(found.to_dict())
        return
    table = bench_report.screen_table(found)
    print_table(f"{found.model.name}; {in_words(found.machine)}", table.columns, table.rows)
    for sentence in bench_report.sentences(found):
        print(sentence)
    print(f"head scores: {found.scores}")
    print(f"wrote {out / 'bench.html'}")
