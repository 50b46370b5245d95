"""The plot of an evaluation: accuracy over the size of the cache."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsemm_edge.evaluation.report import BASELINE, EvaluationRow, Report
from sparsemm_edge.evaluation.settings import Setting, method_of
from sparsemm_edge.reports import check_png, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "sparsemm": "C3",
    "uniform": "C0",
    "pyramid": "C2",
    "random": "C7",
    "paper": "C5",
    "snapkv": "C9",
    "pyramidkv": "C8",
    "full": "black",
}
_OTHER_COLOURS = ("C4", "C6", "olive", "navy", "teal")  # of further lines of a policy
_MARKERS = "osD^vPX*<>hp"


def save_plot(report: Report, path: Path, *, title: str) -> None:
    """Draw accuracy, or without accepted answers token agreement, over KV bytes.

    One panel per way of asking, one row of panels per conversation: first question to last, then the question
    in place of the first. One line per policy, with 95 % confidence intervals over pages; the full f16 cache
    is the dashed line, other full caches are points.

    Raises:
        SparseMMError: the name does not end in .png, or the file cannot be written.
    """
    check_png(path, "the plot")
    threads = report.threads
    if all(len(ways) == 1 for ways in threads):
        threads = [[way for ways in threads for way in ways]]
    n_rows, n_columns = len(threads), max(1, *(len(ways) for ways in threads))
    figure = new_figure(1 + 4.6 * n_columns, 0.6 + 4.2 * n_rows)
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey="row" if len(threads) > 1 else False)
    for axes_of_thread, ways in zip(grid, threads, strict=True):
        for axes, way in zip(axes_of_thread, ways, strict=False):
            _draw(axes, report.rows_of(way))
        for axes in axes_of_thread[len(ways) :]:
            axes.set_visible(False)
    grid[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_png(figure, path)


def _draw(axes: "Axes", rows: list[EvaluationRow]) -> None:
    """A panel: heights over bytes, a line for each label."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    ticks = set()
    for number, label in enumerate(dict.fromkeys(row.label for row in rows)):
        line = sorted((row for row in rows if row.label == label), key=lambda row: row.kv_share)
        heights = np.array([(row.height.low, row.height.mean, row.height.high) for row in line])
        low, means, high = heights.T * 100
        if line[0].setting == Setting("full"):
            axes.axhline(means[0], color="black", linestyle="--", linewidth=1, label="full cache")
            continue
        method = method_of(line[0].setting)
        shares = [row.kv_share * 100 for row in line]
        ticks |= {round(share, 1) for share in shares if method == BASELINE}
        plain = method == "full" or label == next(
            row.label for row in rows if method_of(row.setting) == method
        )
        axes.errorbar(
            shares,
            means,
            yerr=np.maximum([means - low, high - means], 0),
            label=label,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            capsize=2,
            linewidth=2.2 if method == "sparsemm" else 1.4,
            color=_COLOURS[method] if plain else _OTHER_COLOURS[number % len(_OTHER_COLOURS)],
        )
    axes.set_xscale("log")
    if ticks:
        axes.set_xticks(sorted(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(rows[0].way.words, fontsize=10)
    axes.set_xlabel("K and V, % of the full f16 cache")
    axes.set_ylabel("score, %" if rows[0].score else "tokens as with the full cache, %")
    axes.grid(alpha=0.3)
