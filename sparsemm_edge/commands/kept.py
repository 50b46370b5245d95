"""`sparsemm-edge kept`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge.commands import options


def kept(
    loaded: options.ModelOptions,
    evicted: options.EvictionOptions,
    image: Annotated[str, typer.Option(help="The image, a file or a URL.")],
    asked: options.QuestionOptions,
    framed: options.TemplateOptions,
    out: Annotated[Path, typer.Option(help="The picture to write (PNG).")] = Path("kept.png"),
    view: Annotated[
        str,
        typer.Option(help="all: heads that keep a position; layer: the same by layer; head: single heads."),
    ] = "all",
    *,
    cache: options.CacheOptions,
    verbose: options.Verbose = False,
) -> None:
    """Draw which image positions the heads keep after a prompt, beside the map of head budgets.

    \b
    Example:
      sparsemm-edge kept -m llava.sparsemm.gguf --mmproj mmproj.gguf --image page.png -p "What is the total?"
    """
    from sparsemm_edge.errors import SparseMMError
    from sparsemm_edge.image_urls import open_image
    from sparsemm_edge.reports.kept_map import check_picture, save_kept_map
    from sparsemm_edge.runtime import context_for, encode

    check_picture(out, view)
    question, frame = asked.text(), framed.arguments()
    page = open_image(image)
    if loaded.mmproj is None:
        raise SparseMMError("what is kept of an image is drawn: give the model's image encoder with --mmproj")
    with (
        loaded.load(show_log=verbose) as model,
        model.tokenize(model.chat_prompt(question, 1, **frame), [page]) as tokenized,
    ):
        grid = model.image_grid(tokenized)
        with context_for(
            model,
            tokenized,
            n_predict=1,
            **asdict(cache),
            eviction=evicted.eviction(),
        ) as context:
            context.prefill(encode(model, tokenized))
            stats = context.kv_stats()
            if stats.n_evictions == 0:
                raise SparseMMError(
                    f"nothing is evicted from this prompt of {tokenized.n_tokens} positions:"
                    f" {loaded.model} holds no head budgets, or the budget is larger"
                    " (--budget, --policy, --scores)"
                )
            held = context.kept()
    mean, share = stats.positions_kept_mean, stats.positions_kept_mean / tokenized.n_tokens
    title = f"{question}: {mean:.0f} of {tokenized.n_tokens} positions kept ({share:.1%}), mean over heads"
    save_kept_map(page, held, grid, out, view=view, title=title)
    print(f"wrote {out}")
