"""`sparsemm-edge mmproj`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge.commands import options
from sparsemm_edge.output import print_json


def mmproj(
    hf_dir: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="Folder of a LLaVA checkpoint.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("mmproj.gguf"),
    outtype: Annotated[str, typer.Option(help="Type of the matrices: f16 or f32.")] = "f16",
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the image encoder of a LLaVA-1.5 or LLaVA-NeXT checkpoint as mmproj.gguf.

    The text model of the same checkpoint is converted by llama.cpp's convert_hf_to_gguf.py.

    \b
    Example:
      sparsemm-edge mmproj llava-1.5-7b-hf --out mmproj.gguf
    """
    from sparsemm_edge.mmproj import convert_mmproj

    tower = convert_mmproj(hf_dir, out, outtype=outtype, force=force)
    size = out.stat().st_size
    if as_json:
        print_json(
            {
                "path": str(out),
                "tower": tower.model_type,
                "n_layer": tower.n_layer,
                "feature_layers": list(tower.feature_layers),
                "image_size": tower.image_size,
                "n_image_tokens": tower.n_patches,
                "bytes": size,
            }
        )
    else:
        print(f"wrote {out}: {size / 2**20:.1f} MiB")
        print(
            f"{tower.model_type}, {tower.n_layer} layers; {tower.image_size} x {tower.image_size} pixels "
            f"become {tower.n_patches} tokens"
        )
