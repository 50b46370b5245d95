"""The picture of what was kept: every kept image token where it is on the image, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.image_grid import ImageGrid, kept_on_grid
from sparsemm_edge.reports.kept_map import VIEWS, save_kept_map

GRID = ImageGrid(start=5, n_rows=2, n_columns=3)


def positions(*wanted: int) -> np.ndarray:
    return np.array(wanted, dtype=np.int32)


def test_a_position_is_drawn_on_the_token_that_it_belongs_to() -> None:
    # before the image, its first and last token, after the image; a head that keeps no image token
    kept = [[positions(0, 4, 5, 10, 11), positions(11, 12)], [positions(6, 8), positions(5, 6, 7, 8, 9, 10)]]
    held = kept_on_grid(kept, GRID)
    assert held.shape == (2, 2, 2, 3)
    assert held[0, 0].tolist() == [[True, False, False], [False, False, True]]
    assert not held[0, 1].any()
    assert held[1, 0].tolist() == [[False, True, False], [True, False, False]]
    assert held[1, 1].all()


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_a_picture(view: str, tmp_path: Path) -> None:
    kept = [[positions(5, 6), positions(10)], [positions(), positions(5, 6, 7, 8, 9, 10)]]
    out = tmp_path / "kept.png"
    save_kept_map(Image.new("RGB", (90, 60), "white"), kept, GRID, out, view=view, title="a page")
    with Image.open(out) as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 200
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]


@pytest.mark.parametrize("view", VIEWS)
def test_the_colours_follow_what_was_kept(view: str, tmp_path: Path) -> None:
    page = Image.new("RGB", (60, 60), "white")
    grid = ImageGrid(start=0, n_rows=8, n_columns=8)
    everything, half = np.arange(64), np.arange(32)
    pictures = []
    for name, kept in (("a", everything), ("b", half)):
        save_kept_map(page, [[everything, kept]], grid, tmp_path / f"{name}.png", view=view)
        with Image.open(tmp_path / f"{name}.png") as drawn:
            pictures.append(np.asarray(drawn.convert("RGB")).astype(int))
    full, halved = pictures
    assert full.shape == halved.shape
    left = slice(0, full.shape[1] // 2)  # the image is at the left, the head map at the right
    # the upper rows are kept by both heads either way, the lower ones by one head less
    rows = (full != halved).any(axis=2)[:, left].mean(axis=1)
    assert rows[len(rows) // 2 :].mean() > 0.1
    assert rows[: len(rows) // 2].mean() < 0.02  # the caption of a head tells how many it keeps


def test_an_image_that_is_not_square_is_padded_as_the_model_sees_it() -> None:
    from sparsemm_edge.reports.kept_map import _as_seen

    wide = Image.new("RGB", (80, 40), "white")
    padded = _as_seen(wide, ImageGrid(0, 4, 4))
    assert padded.shape == (80, 80)
    assert (padded[20:60] == 1).all() and (padded[:20] < 0.8).all() and (padded[60:] < 0.8).all()
    stretched = _as_seen(wide, ImageGrid(0, 4, 4, padded=False))
    assert stretched.shape == (80, 80) and (stretched == 1).all()


def test_bad_wishes_are_one_clear_line(tmp_path: Path) -> None:
    page, kept = Image.new("RGB", (60, 60)), [[positions(5)]]
    with pytest.raises(SparseMMError, match="unknown view 'most'"):
        save_kept_map(page, kept, GRID, tmp_path / "kept.png", view="most")
    with pytest.raises(SparseMMError, match=r"must end in \.png"):
        save_kept_map(page, kept, GRID, tmp_path / "kept.jpg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "size", "rows_and_columns"),
    [("llava", (112, 112), (8, 8)), ("llava", (50, 200), (8, 8)), ("qwen2vl", (336, 168), (6, 12))],
)
def test_the_grid_of_an_image_is_where_its_tokens_are(
    name: str, size: tuple[int, int], rows_and_columns: tuple[int, int], models: Callable[[str], Any]
) -> None:
    from sparsemm_edge.runtime import VisionModel

    files, page = models(name), Image.new("RGB", size)
    with VisionModel.load(files.gguf(), files.mmproj(), n_threads=1) as model:
        with model.tokenize(model.chat_prompt("What does the page say?", 1), [page]) as prompt:
            grid = model.image_grid(prompt)
            assert grid.start == prompt.parts[0].n_tokens
            assert (grid.n_rows, grid.n_columns) == rows_and_columns
            assert grid.n_rows * grid.n_columns == prompt.parts[1].n_tokens
        with (
            model.tokenize(model.chat_prompt("And this?", 2), [page, page]) as prompt,
            pytest.raises(SparseMMError, match="one image was expected, this one has 2"),
        ):
            model.image_grid(prompt)
