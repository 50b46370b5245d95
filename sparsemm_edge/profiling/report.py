"""The report folder: the figures as JSON, the pictures, and one HTML page that needs nothing but itself."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import atomic_path
from sparsemm_edge.profiling.plots import svg

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f6; color: #2b2f33;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
p { margin: .4rem 0; }
.lead { color: #5c6670; margin-bottom: 1.25rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; }
.card, section { background: #fff; border: 1px solid #e3e6e9; border-radius: .6rem; padding: 1rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.2; color: #b23c26; }
.card span { font-size: .9rem; color: #5c6670; }
section { margin-top: 1rem; }
img { display: block; width: 100%; max-width: 40rem; height: auto; margin: 0 auto; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #e9ebed; white-space: nowrap; }
th { min-width: 4.4rem; font-weight: 600; color: #5c6670; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.evicted td { color: #b23c26; }
tr.evicted td:first-child { font-weight: 600; }
.note { font-size: .9rem; color: #5c6670; }
@media (max-width: 30rem) {
  main { padding: 1rem .6rem 2rem; }
  section, .card { padding: .7rem; }
  .cards { grid-template-columns: 1fr 1fr; }
  .card b { font-size: 1.25rem; }
  th, td { padding: .3rem .45rem; }
}
"""


@dataclass(frozen=True)
class Picture:
    """One picture of a report.

    Attributes:
        name: its file's name, without the ending.
        title: what it shows, above it.
        note: how to read it, below it.
        figure: the picture.
    """

    name: str
    title: str
    note: str
    figure: Figure


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        stand_out: for each row whether it is set off from the others; empty: none is.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    stand_out: Sequence[bool] = ()


def make_folder(folder: Path) -> None:
    """Make the folder of a report, before long work that ends in it.

    Raises:
        SparseMMError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise SparseMMError(f"cannot write into the folder {folder}: {error.strerror}") from error


def write(
    folder: Path,
    name: str,
    content: dict[str, Any],
    *,
    title: str,
    lead: str,
    cards: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    notes: Sequence[str],
) -> None:
    """Write `<name>.json`, `<name>.html` and `<picture>.png`; each file is there whole or not at all.

    Args:
        folder: exists.
        name: of the JSON and HTML files.
        content: of the JSON file.
        title, lead: what the page is about, and on which machine.
        cards: the figures to see first: the figure and what it is.
        tables, pictures: the rest of the page, in order.
        notes: what a reader has to know, a paragraph each.
    """
    with atomic_path(folder / f"{name}.json") as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for picture in pictures:
        with atomic_path(folder / f"{picture.name}.png") as part:
            picture.figure.savefig(part, format="png", dpi=160)
    with atomic_path(folder / f"{name}.html") as part:
        part.write_text(_page(title, lead, cards, tables, pictures, notes), encoding="utf-8")


def _page(
    title: str,
    lead: str,
    cards: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    notes: Sequence[str],
) -> str:
    boxes = "".join(
        f'<div class="card"><b>{escape(figure)}</b><span>{escape(what)}</span></div>'
        for figure, what in cards
    )
    parts = [_section(picture) for picture in pictures] + [_table(table) for table in tables]
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        f'<div class="cards">{boxes}</div>{"".join(parts)}'
        f'<section class="note"><h2>What was measured</h2>{paragraphs}</section></main></body></html>\n'
    )


def _section(picture: Picture) -> str:
    data = base64.b64encode(svg(picture.figure).encode()).decode()
    return (
        f"<section><h2>{escape(picture.title)}</h2>"
        f'<img alt="{escape(picture.title)}" src="data:image/svg+xml;base64,{data}">'
        f'<p class="note">{escape(picture.note)}</p></section>\n'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = ""
    for row, stands_out in zip(table.rows, table.stand_out or [False] * len(table.rows), strict=True):
        kind = ' class="evicted"' if stands_out else ""
        rows += f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>\n"
    )
