"""`sparsemm-edge kept`."""

from pathlib import Path
from typing import Annotated

import typer


def kept(
    model: Annotated[Path, typer.Option("--model", "-m", help="The text model, a GGUF file.")],
    mmproj: Annotated[Path, typer.Option(help="Its image encoder, a GGUF file.")],
    image: Annotated[Path, typer.Option(help="The image.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What is asked about it.")],
    out: Annotated[Path, typer.Option(help="The picture to write (PNG).")] = Path("kept.png"),
    view: Annotated[
        str,
        typer.Option(help="all: heads that keep a position; layer: the same by layer; head: single heads."),
    ] = "all",
    budget: Annotated[
        int | None, typer.Option(help="Positions a KV head keeps on average, instead of the file's budget.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="sparsemm, uniform, pyramid or random, instead of the file's.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Last prompt positions, which vote and are kept, instead of the file's."),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Head scores to use instead of the file's, a JSON file.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads [default: the physical cores].")] = None,
) -> None:
    """Draw what the heads keep of an image after a prompt, next to the map of heads.

    \b
    Example:
      sparsemm-edge kept -m llava.sparsemm.gguf --mmproj mmproj.gguf --image page.png -p "What is the total?"
    """
    from PIL import Image

    from sparsemm_edge.errors import SparseMMError
    from sparsemm_edge.kept_map import check_picture, save_kept_map
    from sparsemm_edge.runtime import Eviction, VisionModel
    from sparsemm_edge.runtime.prompt import read_image

    check_picture(out, view)
    page = Image.fromarray(read_image(image))
    eviction = Eviction(policy=policy, budget=budget, window=window, scores=scores)
    with (
        VisionModel.load(model, mmproj, n_threads=threads) as loaded,
        loaded.tokenize(loaded.chat_prompt(prompt, 1), [page]) as tokenized,
    ):
        grid = loaded.image_grid(tokenized)
        with loaded.start(tokenized, n_predict=1, eviction=eviction) as session:
            session.read_prompt()
            stats = session.kv_stats()
            if stats.n_evictions == 0:
                raise SparseMMError(
                    f"nothing is evicted from this prompt of {tokenized.n_tokens} positions:"
                    f" {model} holds no head budgets, or the budget is larger (--budget, --policy, --scores)"
                )
            held = session.kept()
    mean, share = stats.positions_kept_mean, stats.positions_kept_mean / tokenized.n_tokens
    title = f"{prompt}: {mean:.0f} of {tokenized.n_tokens} positions kept ({share:.1%}), mean over heads"
    save_kept_map(page, held, grid, out, view=view, title=title)
    print(f"wrote {out}")
