"""Plots of head budgets and head scores."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge.reports import check_png, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def save_head_map(table: npt.NDArray[np.integer[Any]], path: Path, *, title: str) -> None:
    """Plot a table of positions per head as a PNG: layers down, KV heads across, colour = positions.

    The colours are logarithmic, since a few visual heads keep many times more than the others.

    Args:
        table: [n_layer, n_head_kv], head budgets or positions kept, at least 1.
        path: the PNG file, replaced if it exists.
        title: shown above the map.

    Raises:
        SparseMMError: the name does not end in .png, or the file cannot be written.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    low, high = int(table.min()), int(table.max())
    figure, axes, image = _map(table, path, title, "KV head", LogNorm(low, max(high, low + 1)))
    ticks = sorted({round(tick) for tick in np.geomspace(low, high, 6)})
    bar = figure.colorbar(image, ax=axes, ticks=ticks, format=FuncFormatter(lambda value, _: f"{value:.0f}"))
    bar.minorticks_off()
    bar.set_label("positions")
    save_png(figure, path)


def save_score_map(table: npt.NDArray[np.floating[Any]], path: Path, *, title: str) -> None:
    """Plot head scores as a PNG: layers down, query heads across, colour = share of the total score.

    Colours follow the square root, so that weaker heads are visible too.

    Args:
        table: [n_layer, n_head], not negative.
        path: the PNG file, replaced if it exists.
        title: shown above the map.

    Raises:
        SparseMMError: the name does not end in .png, or the file cannot be written.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    figure, axes, image = _map(table / table.sum(), path, title, "head", PowerNorm(0.5, vmin=0))
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(xmax=1))
    bar.set_label("share of the score")
    save_png(figure, path)


def _map(table: npt.NDArray[Any], path: Path, title: str, across: str, norm: Any) -> tuple[Any, Any, Any]:
    """Figure, axes and image of a table of layers x heads."""
    check_png(path, "the head map")
    n_layer, n_heads = table.shape
    width, height = 4 + 0.19 * n_heads, 2.2 + 0.17 * n_layer
    figure = new_figure(min(width, 12), min(height, 12))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, wrap=True)
    return figure, axes, draw_heads(axes, table, across, norm=norm)


def draw_heads(axes: "Axes", table: npt.NDArray[Any], across: str, **colours: Any) -> "AxesImage":
    """Draw a table of layers x heads, its colours as for Axes.imshow."""
    from matplotlib.ticker import MaxNLocator  # takes half a second

    axes.set_xlabel(across)
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10]))
    return axes.imshow(table, aspect="auto", cmap="viridis", **colours)
