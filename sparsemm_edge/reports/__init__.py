"""Plots (PNG) and HTML reports. Everything that is drawn is drawn here, with matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_png(path: Path, what: str) -> None:
    """Raise SparseMMError unless the file's name ends in .png."""
    if path.suffix.lower() != ".png":
        raise SparseMMError(f"{what} is a PNG picture: {path} must end in .png")


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches. No pyplot, so no display and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def save_png(figure: "Figure", path: Path, dpi: int = 120) -> None:
    """Write a figure, complete or not at all."""
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=dpi)
