"""`sparsemm-edge inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge.commands import options
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.output import console, print_figures, print_json


def inspect(
    model: Annotated[Path, typer.Argument(help="A GGUF file.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the head map as a picture: layers x KV heads (PNG).")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the head budgets of a GGUF file, and the memory that they save.

    \b
    Example:
      sparsemm-edge inspect llava-7b.sparsemm.gguf --plot head-map.png
    """
    from sparsemm_edge.gguf_header import read_header
    from sparsemm_edge.gguf_metadata import model_shape, sparsemm_metadata, text_architecture
    from sparsemm_edge.inspection import kv_bytes, to_dict

    header = read_header(model)
    text_architecture(header)
    metadata = sparsemm_metadata(header)
    if metadata is None:
        if plot:
            raise SparseMMError(f"{model} holds no sparsemm metadata, so there is no head map to draw")
        if as_json:
            print_json({"path": str(model), "sparsemm": None})
        else:
            print(f"{model} holds no sparsemm metadata: llama.cpp keeps its whole KV cache.")
        return

    shape = model_shape(header)
    report = to_dict(shape, metadata)
    saved = kv_bytes(shape, metadata)
    if plot:
        from sparsemm_edge.reports.head_map import save_head_map

        spec = metadata.spec
        save_head_map(
            metadata.head_budgets,
            plot,
            title=f"{shape.name}: {spec.policy}, budget {spec.budget}",
        )
    if as_json:
        print_json({"path": str(model), "sparsemm": report, "kv_bytes": saved})
    else:
        print_figures(report)
        _print_kv_bytes(saved)
        if plot:
            print(f"wrote {plot}")


def _print_kv_bytes(saved: dict[str, dict[int, int]]) -> None:
    """KV bytes per policy and prompt length, as MiB and as a share of the full cache."""
    from rich.table import Table

    full = saved["full"]
    table = Table(title="K and V after the prompt, f16", title_justify="left")
    table.add_column("policy")
    for n_prompt in full:
        table.add_column(f"{n_prompt} positions", justify="right")
    for row, cells in saved.items():
        table.add_row(row, *(f"{size / 2**20:.1f} MiB {size / full[n]:7.1%}" for n, size in cells.items()))
    console().print(table)
