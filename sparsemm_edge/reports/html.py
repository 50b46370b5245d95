"""A report folder: figures as JSON, PNG pictures, and one self-contained HTML page (report.html.jinja)."""

import base64
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from sparsemm_edge.errors import os_errors
from sparsemm_edge.files import atomic_path
from sparsemm_edge.reports import save_png
from sparsemm_edge.reports.profiling_plots import svg

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class Picture:
    """A picture with its texts.

    Attributes:
        name: file name without suffix.
        title: shown above.
        note: how to read it, shown below.
        figure: the picture.
    """

    name: str
    title: str
    note: str
    figure: Figure

    @property
    def data_url(self) -> str:
        """The figure as SVG."""
        return f"data:image/svg+xml;base64,{base64.b64encode(svg(self.figure).encode()).decode()}"


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        stand_out: for each row, whether it is highlighted; empty: none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    stand_out: Sequence[bool] = ()


def make_folder(folder: Path) -> None:
    """Create the folder of a report, before the work that it reports.

    Raises:
        SparseMMError: it cannot be created or written.
    """
    with os_errors(f"write into the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


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
    """Write `<name>.json`, `<name>.html` and `<picture>.png`; each file is complete or absent.

    Args:
        folder: exists.
        name: of the JSON and HTML files.
        content: of the JSON file.
        title, lead: heading, and the machine.
        cards: headline figures: the figure and its description.
        tables, pictures: in order.
        notes: paragraphs at the end.
    """
    with atomic_path(folder / f"{name}.json") as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for picture in pictures:
        save_png(picture.figure, folder / f"{picture.name}.png", dpi=160)
    with atomic_path(folder / f"{name}.html") as part:
        part.write_text(
            _TEMPLATES.get_template("report.html.jinja").render(
                title=title, lead=lead, cards=cards, tables=tables, pictures=pictures, notes=notes
            ),
            encoding="utf-8",
        )
