"""Plot which image positions the heads kept, over the image, beside the head map."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.image_grid import ImageGrid, Kept, kept_on_grid
from sparsemm_edge.reports import check_png, new_figure, save_png
from sparsemm_edge.reports.head_map import draw_heads

VIEWS = ("all", "layer", "head")

_N_HEADS_DRAWN = 12
_PAD_COLOUR = (122, 116, 104)  # what llama.cpp pads LLaVA's images with
_COLOURS = ("#c9d2dc", "#ffe873", "#ff9a2e", "#ee2f45")  # none to most; black letters show on all of them


def check_picture(path: Path, view: str) -> None:
    """Raise SparseMMError for an unknown view or a file that is not a PNG."""
    if view not in VIEWS:
        raise SparseMMError(f"unknown view {view!r} of what was kept: expected one of {', '.join(VIEWS)}")
    check_png(path, "the map of kept positions")


def save_kept_map(
    image: Image.Image,
    kept: Kept,
    grid: ImageGrid,
    path: Path,
    *,
    view: str = "all",
    title: str = "",
) -> None:
    """Draw the image positions that the heads keep over the image, next to the head map, as a PNG.

    Args:
        image: the input image, of any size.
        kept: of one prompt, see Session.kept_positions. Positions outside the image are not drawn.
        grid: where the image's tokens are, see VisionModel.image_grid.
        path: the PNG file, replaced if it exists.
        view: `all` colours each image token by the number of heads that keep it, over all layers;
            `layer` draws a picture of that kind for each layer; `head` shows what single heads keep: of at
            most 12 heads from the one that keeps most of the image to the one that keeps least.
        title: shown above.

    Raises:
        SparseMMError: an unknown view, the name does not end in .png, or the file cannot be written.
    """
    check_picture(path, view)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    held = kept_on_grid(kept, grid)
    panels = _panels(held, view)
    n_columns = min(len(panels), 4)
    n_rows = -(-len(panels) // n_columns)
    # one large picture, or rows of small ones; a very wide or high image is cut to a bearable shape
    side = 4.6 if len(panels) == 1 else 2.2
    height = side * min(max(grid.n_rows / grid.n_columns, 0.25), 2.5)
    width = side * n_columns + 0.9
    figure = new_figure(width + 4.3, max(height * n_rows, 2.6) + 1.1)
    halves: Any = figure.subfigures(1, 2, width_ratios=(width, 4.3))
    left, right = halves
    if title:
        figure.suptitle(title, fontsize=10, wrap=True)

    page = _as_seen(image, grid)
    most = max(int(counts.max()) for _, counts in panels)
    colours = ScalarMappable(
        Normalize(0, max(most, 1)), LinearSegmentedColormap.from_list("kept", list(_COLOURS))
    )
    axes = np.atleast_1d(left.subplots(n_rows, n_columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, counts) in zip(axes, panels, strict=False):
        axis.imshow(_coloured(page, colours.to_rgba(counts)[..., :3]))
        axis.set_title(name, fontsize=8)
    if view != "head":
        bar = left.colorbar(colours, ax=list(axes), shrink=0.8, ticks=MaxNLocator(integer=True))
        bar.set_label("heads that keep it")

    heads = right.subplots()
    table = draw_heads(heads, held.sum(axis=(2, 3)), "KV head", vmin=0)
    heads.set_title("image positions kept, by head", fontsize=9)
    right.colorbar(table, ax=heads, label=f"of {grid.n_rows * grid.n_columns}")
    save_png(figure, path)


def _panels(held: npt.NDArray[np.bool_], view: str) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """The panels of a view: name, and number of heads that keep each image token, [n_rows, n_columns]."""
    n_layer, n_head_kv = held.shape[:2]
    if view == "all":
        counts = held.sum(axis=(0, 1))
        return [(f"heads of {n_layer * n_head_kv} that keep each image token", counts)]
    if view == "layer":
        return [(f"layer {layer}", held[layer].sum(axis=0)) for layer in range(n_layer)]
    n_kept = held.sum(axis=(2, 3)).ravel()
    by_kept = np.argsort(-n_kept, kind="stable")
    n_drawn = min(_N_HEADS_DRAWN, by_kept.size)
    chosen = by_kept[np.linspace(0, by_kept.size - 1, n_drawn).round().astype(int)]
    return [
        (
            f"layer {index // n_head_kv}, head {index % n_head_kv}: {n_kept[index]}",
            held[index // n_head_kv, index % n_head_kv].astype(np.int64),
        )
        for index in chosen
    ]


def _as_seen(image: Image.Image, grid: ImageGrid) -> npt.NDArray[np.float64]:
    """The image as the model sees it: grey, 0 to 1, whole pixels for each image token."""
    scale = max(1, round(max(image.size) / max(grid.n_rows, grid.n_columns)))
    size = grid.n_columns * scale, grid.n_rows * scale
    image = image.convert("RGB")
    image = ImageOps.pad(image, size, color=_PAD_COLOUR) if grid.padded else image.resize(size)
    return np.asarray(image.convert("L")) / 255


def _coloured(page: npt.NDArray[np.float64], colours: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The page [height, width] in the colours [n_rows, n_columns, 3] of its tokens: [height, width, 3]."""
    scale = page.shape[0] // colours.shape[0]
    # dark areas stay bright enough to distinguish colours
    return (0.3 + 0.7 * page)[..., None] * colours.repeat(scale, axis=0).repeat(scale, axis=1)
