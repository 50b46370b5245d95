"""Pictures of head budgets."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import atomic_path


def save_head_map(table: npt.NDArray[np.integer[Any]], path: Path, *, title: str) -> None:
    """Draw a table of positions per head as a PNG: layers down, KV heads across, colour = positions.

    The colours are logarithmic, as a few visual heads hold many times what the others do.

    Args:
        table: [n_layer, n_head_kv], head budgets or positions kept, at least 1.
        path: the PNG file, replaced if it exists.
        title: shown above the map.

    Raises:
        SparseMMError: the name does not end in .png, or the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise SparseMMError(f"the head map is a PNG picture: {path} must end in .png")
    # matplotlib takes half a second to import; no pyplot, so no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    n_layer, n_head_kv = table.shape
    low, high = int(table.min()), int(table.max())
    width, height = 4 + 0.19 * n_head_kv, 2.2 + 0.17 * n_layer
    figure = Figure(figsize=(min(width, 12), min(height, 12)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(table, aspect="auto", cmap="viridis", norm=LogNorm(low, max(high, low + 1)))
    axes.set_title(title, fontsize=10, wrap=True)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10]))
    ticks = sorted({round(tick) for tick in np.geomspace(low, high, 6)})
    bar = figure.colorbar(image, ax=axes, ticks=ticks, format=FuncFormatter(lambda value, _: f"{value:.0f}"))
    bar.minorticks_off()
    bar.set_label("positions")
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)
