"""Sources of pages: generated, or read from a user's folder.

A folder holds images and .json, .jsonl or (with pyarrow) .parquet files with one record per page, in one of
two formats:

- {"image": file name, "chunks": [{"text": "...", "box": [left, top, right, bottom]}, ...]}, boxes in pixels;
- as synthdog-en-detection is published: `2_coord`, a list of {"chunk", "coord": corner points}, and the image
  as bytes, or as a file name in `image` or `image_name` (the form that SparseMM's own script makes of it).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sparsemm_edge.errors import SparseMMError, check_within
from sparsemm_edge.files import parse_json, read_json, read_json_lines, read_parquet
from sparsemm_edge.pages import Chunk, Page, documents, grid, scenes
from sparsemm_edge.pictures import open_picture

FIRST_SCORING_SEED = 10_000
"""Grid pages of lower seeds are for evaluation: budgets are not judged on the pages they come from."""

PAGES_A_SEED = 10_000
"""How many pages a seed has before the next seed's begin."""


@dataclass(frozen=True)
class PageSource:
    """Pages to read one by one.

    Attributes:
        name: for reports.
        prompt: the question; scenes have one each.
        n_pages: number of pages.
        page: returns the page of an index below n_pages.
        kind: task type: "reading" or "scenes".
    """

    name: str
    prompt: str
    n_pages: int
    page: Callable[[int], Page]
    kind: str = "reading"


def open_pages(
    data: str, n_pages: int, *, seed: int = 0, size: tuple[int, int] = documents.SIZE
) -> PageSource:
    """Pages to score on.

    Args:
        data: "documents", "scenes", a name in grid.GRIDS ("grid": what the demo model reads), each made by
            the module of pages/ of that name, or a folder.
        n_pages: number of pages; a folder with fewer gives all of them.
        seed: of generated pages; ignored for folders.
        size: width and height in pixels of "documents".

    Raises:
        SparseMMError: no such folder, no page descriptions in it, or an argument out of range.
    """
    check_within("the number of pages", n_pages, 1, PAGES_A_SEED)
    check_within("the seed", seed, 0, (grid.FIRST_TRAINING_SEED - FIRST_SCORING_SEED) // PAGES_A_SEED - 1)
    first = FIRST_SCORING_SEED + seed * PAGES_A_SEED
    page: Callable[[int], Page]
    if data == "documents":
        page = partial(documents.document_page, size=size)
        page(first)  # refuses a wrong size at once
        name, prompt = f"documents of {size[0]} x {size[1]} pixels, seed {seed}", documents.PROMPT
    elif data == "scenes":
        page, name, prompt = scenes.scene, f"scenes, seed {seed}", scenes.PROMPT
    elif data in grid.GRIDS:
        page = partial(grid.grid_page, grid=grid.GRIDS[data])
        name, prompt = f"{data} pages, seed {seed}", grid.READ_PROMPT
    elif Path(data).is_dir():
        return _folder(Path(data), n_pages)
    else:
        raise SparseMMError(
            f"there is no folder {data}; --data is documents, scenes, {', '.join(grid.GRIDS)} or a folder"
            " with pages"
        )
    kind = "scenes" if data == "scenes" else "reading"
    return PageSource(name, prompt, n_pages, lambda index: page(first + index), kind)


def page_size(text: str) -> tuple[int, int]:
    """Width and height of an option such as 896x672."""
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if found is None:
        raise SparseMMError(
            f"the page size is {text[:80]!r}: expected width x height in pixels, such as 896x672"
        )
    return int(found[1]), int(found[2])


def _folder(folder: Path, n_pages: int) -> PageSource:
    records = list(islice(_records(folder), n_pages))
    if not records:
        raise SparseMMError(f"{folder} holds no pages")
    for where, record in records:  # everything but the pixels is checked before a model is loaded
        _chunks(where, record)
        _image_of(where, record)
    return PageSource(
        folder.resolve().name, documents.PROMPT, len(records), lambda index: _page(folder, *records[index])
    )


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every page record of a folder with its place, files in order of name."""
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in (".json", ".jsonl", ".parquet")
    )
    if not files:
        raise SparseMMError(f"{folder} holds no .json, .jsonl or .parquet file that describes pages")
    for path in files:
        for number, record in enumerate(_read(path), 1):
            where = f"{path}, page {number}"
            if not isinstance(record, dict):
                raise SparseMMError(f"{where}: expected an object, found {type(record).__name__}")
            yield where, record


def _read(path: Path) -> Iterator[Any]:
    if path.suffix.lower() == ".parquet":
        yield from read_parquet(path)
    elif path.suffix.lower() == ".jsonl":
        yield from (record for _, record in read_json_lines(path))
    elif isinstance(content := read_json(path), list):
        yield from content
    else:
        raise SparseMMError(f"{path}: expected a list of pages, found {type(content).__name__}")


def _page(folder: Path, where: str, record: dict[str, Any]) -> Page:
    source = _image_of(where, record)
    if isinstance(source, bytes):
        name, picture = where, open_picture(source, f"{where}, its image")
    else:
        name, picture = source, open_picture(folder / source, f"{where}, {folder / source}")
    return Page(name, picture, _chunks(where, record))


def _image_of(where: str, record: dict[str, Any]) -> str | bytes:
    """The file name of a record's image, or its bytes."""
    image = record.get("image", record.get("image_name"))
    if isinstance(image, dict):  # as the datasets library stores images
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str | bytes) or not image:
        raise SparseMMError(f'{where}: "image" must be a file name')
    return image


def _chunks(where: str, record: dict[str, Any]) -> tuple[Chunk, ...]:
    key = next((key for key in _FORMATS if key in record), None)
    if key is None:
        raise SparseMMError(f'{where}: expected "chunks" or "2_coord", found {", ".join(map(str, record))}')
    items = record[key]
    if key == "2_coord" and isinstance(items, str):  # nested fields are sometimes stored as JSON text
        items = parse_json(items, f'{where}: "2_coord"', "a list")
    if not isinstance(items, list):
        raise SparseMMError(f'{where}: "{key}" is not a list')
    return tuple(chunk for item in items if (chunk := _FORMATS[key](where, item)) is not None)


def _own(where: str, chunk: Any) -> Chunk:
    text = chunk.get("text") if isinstance(chunk, dict) else None
    box = chunk.get("box") if isinstance(chunk, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise SparseMMError(f'{where}: a chunk needs a "text", found {chunk!r}'[:300])
    numbers = _numbers(box)
    if len(numbers) != 4 or numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        raise SparseMMError(
            f'{where}: chunk {text!r} needs a "box" of left, top, right, bottom in pixels, found {box!r}'
        )
    return Chunk(text, (numbers[0], numbers[1], numbers[2], numbers[3]))


def _synthdog(where: str, item: Any) -> Chunk | None:
    """A chunk with its corner points, or None if it is blank or has no extent."""
    text = item.get("chunk") if isinstance(item, dict) else None
    coord = item.get("coord") if isinstance(item, dict) else None
    points = [_numbers(point) for point in coord] if isinstance(coord, list) else []
    if not isinstance(text, str) or not points or any(len(point) != 2 for point in points):
        raise SparseMMError(
            f'{where}: "2_coord" needs a "chunk" and the "coord" of its corners, found {item!r}'[:300]
        )
    xs, ys = zip(*points, strict=True)
    box = (min(xs), min(ys), max(xs), max(ys))
    return Chunk(text, box) if text.strip() and box[0] < box[2] and box[1] < box[3] else None


def _numbers(values: Any) -> list[float]:
    """A list of numbers as floats; anything else is empty."""
    numbers = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
    return [float(value) for value in values] if numbers else []


_FORMATS: dict[str, Callable[[str, Any], Chunk | None]] = {"chunks": _own, "2_coord": _synthdog}
