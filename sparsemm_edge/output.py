"""Printing shared by several commands."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparsemm_edge.defaults import MAX_POSITIONS
from sparsemm_edge.errors import SparseMMError, check_within

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 500  # of what goes to a file or a pipe: no table is as wide, and no line is cut


def console(*, stderr: bool = False) -> "Console":
    """A console as wide as the terminal; without a terminal, lines are not wrapped."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _WIDTH
    return made


@contextmanager
def progress_bar(
    what: str, *, of_bytes: bool = False, stays: bool = False, shown: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, on terminals only: call it with done and total.

    It disappears at the end, or `stays` with the time that it took.
    """
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    done = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), done, Left(elapsed_when_finished=stays))
    err = console(stderr=True)
    with Progress(*columns, console=err, transient=not stays, disable=not (shown and err.is_terminal)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(content, indent=2))


def print_figures(report: dict[str, Any]) -> None:
    """The statistics of a converted model, one per line."""
    table = report["head_budgets"]
    length = report["water_fill_length"]
    lines = {
        "model": f"{report['name']} ({report['architecture']}), {report['n_layer']} layers,"
        f" {report['n_head']} query heads, {report['n_head_kv']} KV heads",
        "policy": report["policy"]
        + ("" if report["enabled"] else ", switched off (sparsemm.enabled = false)"),
        "budget": f"{report['budget']} positions per KV head on average, window {report['window']};"
        f" floor ratio {report['floor_ratio']:g}",
        "water-filled": f"for a prompt of {length} positions" if length else "no",
        "head budgets": f"min {table['min']}, median {table['median']:g}, max {table['max']};"
        f" {table['heads_at_floor']:.1%} of the KV heads at the floor",
        "scores": report["scores_source"],
    }
    for name, text in lines.items():
        print(f"{name + ':':<14}{text}")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of figures, the first column left, the others right."""
    from rich import box
    from rich.table import Table

    print(title)  # a table would break its title where it ends itself
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def whole_numbers(option: str, text: str) -> list[int]:
    """Parse an option such as 64,256; empty text gives no numbers.

    Raises:
        SparseMMError: something else than positive whole numbers and commas.
    """
    numbers = []
    for part in text.split(",") if text.strip() else []:
        try:
            numbers.append(int(part))
        except ValueError as error:
            raise SparseMMError(
                f"{option} is {text[:80]!r}: expected positive whole numbers and commas, such as 64,256"
            ) from error
        check_within(f"a number of {option}", numbers[-1], 1, MAX_POSITIONS)
    return numbers
