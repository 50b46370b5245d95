"""`sparsemm-edge fit`."""

import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsemm_edge.commands import options
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.output import print_json, print_table

if TYPE_CHECKING:
    from sparsemm_edge.profiling.fit import Fit

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def fit(
    model: Annotated[Path | None, typer.Argument(help="The text model, a GGUF file.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="The shape of a published model instead, weights in Q4_0: see bench --shape."),
    ] = None,
    mmproj: options.Mmproj = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image file, or a size in pixels such as 1344x896; may be given several times."),
    ] = None,
    n_text: Annotated[int, typer.Option(help="Positions of the prompt's text, template included.")] = 64,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Tokens of the reply.")] = 256,
    n_ctx: Annotated[
        int | None,
        typer.Option("--n-ctx", "-c", help="Places in the KV cache [default: what prompt and reply need]."),
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Budget to evict to [default: the file's].")] = None,
    *,
    cache: options.CacheOptions,
    scores: options.Scores = None,
    window: options.Window = None,
    kv_max_tail: options.KvMaxTail = None,
    n_gpu_layers: options.NGpuLayers = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory to fit into, such as 8G [default: this machine's available memory]."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compute the memory that a model, its images and its cache need, without running it.

    K and V are exact; --cache-type-k and -v are of the evicted cache. Compute buffers are llama.cpp's own
    numbers; the image encoder's are for its warm-up image. Totals include the memory of all devices.

    \b
    Examples:
      sparsemm-edge fit llava.sparsemm.gguf --mmproj mmproj.gguf --image 1344x896 --memory 8G
      sparsemm-edge fit --shape qwen3-vl-8b --n-text 2944 --memory 8G
    """
    from sparsemm_edge.profiling import shapes
    from sparsemm_edge.profiling.fit import fit as estimate

    if (model is None) == (shape is None):
        raise SparseMMError("fit needs a model: give one of MODEL.gguf and --shape NAME")
    image_sizes = [_size(text) for text in image or []]
    n_bytes = None if memory is None else _bytes(memory)
    with ExitStack() as stack:
        if shape is not None:
            model = stack.enter_context(shapes.header_of_shape(shape, shapes.find_shape(shape, None)))
        assert model is not None
        found = estimate(
            model,
            mmproj,
            image_sizes,
            n_text=n_text,
            n_predict=n_predict,
            n_ctx=n_ctx,
            budget=budget,
            window=window,
            max_tail=kv_max_tail,
            n_gpu_layers=n_gpu_layers,
            scores=scores,
            memory=n_bytes,
            **vars(cache),
        )
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)


def _show(found: "Fit") -> None:
    def mib(n_bytes: int) -> str:
        value = n_bytes / 2**20
        return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"

    images = f", images {' + '.join(map(str, found.image_tokens))}" if found.image_tokens else ""
    title = f"{found.model.name}: prompt of {found.n_prompt} positions{images}; context {found.n_ctx}; MiB"
    columns = ("setting", "weights", "vision", "compute", "K+V", "at peak", "total", "fits")
    rows = []
    for row in found.rows:
        sizes = (row.weights, row.vision, row.compute, row.kv, row.kv_peak, row.total)
        rows.append([row.name, *map(mib, sizes), "yes" if row.fits else "no"])
    print_table(title, columns, rows)
    print(
        f"into {found.memory / 2**30:.1f} GiB; this machine has {found.memory_total / 2**30:.1f} GiB,"
        f" {found.memory_available / 2**30:.1f} GiB available;"
        f" the program itself takes {mib(found.rows[0].program)} MiB"
    )
    if found.largest is None or found.largest.budget is None:
        print("no budget fits")
    elif found.largest.budget >= found.n_prompt:
        print("every budget fits, up to the whole prompt")
    else:
        print(f"the largest budget that fits: {found.largest.budget} (total {mib(found.largest.total)} MiB)")
    print(f"head scores: {found.scores}")


def _size(text: str) -> tuple[int, int]:
    """Width and height of an image: of a file, or as written."""
    found = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", text)
    if found is None:
        if not os.path.exists(text):
            raise SparseMMError(
                f"--image is {text!r}: expected an image file, or a size in pixels such as 672x336"
            )
        from sparsemm_edge.pictures import open_picture

        return open_picture(text).size
    width, height = int(found[1]), int(found[2])
    if not (1 <= width <= 2**15 and 1 <= height <= 2**15):
        raise SparseMMError(f"--image is {text!r}: a side must be 1 to {2**15} pixels")
    return width, height


def _bytes(text: str) -> int:
    """8G, 500M, ... in bytes."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([KMGT])(?:i?B)?", text.strip(), re.IGNORECASE)
    n_bytes = 0 if found is None else round(float(found[1]) * _UNITS[found[2].upper()])
    if not n_bytes:
        raise SparseMMError(f"--memory is {text[:80]!r}: expected a number and a unit, such as 8G or 1500M")
    return n_bytes
