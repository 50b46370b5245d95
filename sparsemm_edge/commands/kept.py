"""`sparsemm-edge kept`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge.commands import options


def kept(
    model: options.Model,
    mmproj: options.Mmproj,
    image: Annotated[Path, typer.Option(help="The image.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What is asked about it.")],
    out: Annotated[Path, typer.Option(help="The picture to write (PNG).")] = Path("kept.png"),
    view: Annotated[
        str,
        typer.Option(help="all: heads that keep a position; layer: the same by layer; head: single heads."),
    ] = "all",
    budget: options.Budget = None,
    policy: options.Policy = None,
    window: options.Window = None,
    scores: options.Scores = None,
    threads: options.Threads = None,
) -> None:
    """Draw what the heads keep of an image after a prompt, next to the map of heads.

    \b
    Example:
      sparsemm-edge kept -m llava.sparsemm.gguf --mmproj mmproj.gguf --image page.png -p "What is the total?"
    """
    from sparsemm_edge.errors import SparseMMError
    from sparsemm_edge.kept_map import check_picture, save_kept_map
    from sparsemm_edge.pictures import open_picture
    from sparsemm_edge.runtime import Eviction, VisionModel

    check_picture(out, view)
    page = open_picture(image)
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
