"""Which image token shows what in llama.cpp: paint a box, and the embeddings that change are those named.

mtmd prepares the image and computes the embeddings, in encoders whose patches do not see each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers.architectures import made
from helpers.boxes import boxes
from helpers.models import sample_image, test_model
from helpers.tiny_mmproj import KINDS, write_mmproj
from sparsemm_edge import SparseMMError
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.runtime import Loading, VisionModel
from sparsemm_edge.runtime.prompt import ImagePart, image_marker
from sparsemm_edge.scoring.gguf import image_tokens
from sparsemm_edge.scoring.mtmd_layout import SUPPORTED, ImageEncoder

PAGES = [(112, 112), (300, 220), (150, 400), (640, 180), (231, 97)]  # width, height


@cache
def files(kind: str) -> tuple[Path, Path]:
    """A text model, and an image encoder whose patches do not see each other."""
    folder = Path(mkdtemp())
    path = folder / "mmproj.gguf"
    if kind == "paddleocr":  # its rows and columns are told by a text model with M-RoPE alone
        return made(kind).text, write_mmproj(path, kind, 64)
    if kind in KINDS:
        return test_model("llava").gguf("f32"), write_mmproj(path, kind, 128)
    if kind == "qwen2vl":
        model = test_model("qwen2vl").gguf("f32")
        shutil.copyfile(test_model("qwen2vl").mmproj("f32"), path)
    else:
        model = made(kind).text
        shutil.copyfile(made(kind).mmproj, path)
    n_silenced = 0
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if ".attn_out." in tensor.name:
            tensor.data[:] = 0
            n_silenced += 1
    assert n_silenced == (3 if kind == "glm4v" else 6)  # weights, and biases where it has them
    return model, path


@pytest.fixture(scope="module", params=[*KINDS, "qwen2vl", "qwen2.5-vl", "qwen3-vl", "glm4v"])
def seen(request: pytest.FixtureRequest) -> Iterator[tuple[VisionModel, ImageEncoder]]:
    text, mmproj = files(request.param)
    with VisionModel.load(text, mmproj, n_threads=1) as model:
        yield model, ImageEncoder(read_header(mmproj))


def embeddings(model: VisionModel, page: Image.Image) -> np.ndarray:
    with model.tokenize(image_marker(), [page]) as prompt:
        return np.concatenate(
            [model.encode_image(part) for part in prompt.parts if isinstance(part, ImagePart)]
        )


def layout_of(model: VisionModel, encoder: ImageEncoder, page: Image.Image) -> Any:
    with model.tokenize(image_marker(), [page]) as prompt:
        positions, grid = image_tokens(prompt)
        return encoder.layout((page.height, page.width), len(positions), grid)


@pytest.mark.parametrize("size", PAGES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_painting_a_box_changes_exactly_the_tokens_that_show_it(
    seen: tuple[VisionModel, ImageEncoder], size: tuple[int, int]
) -> None:
    model, encoder = seen
    if encoder.kind == "idefics3" and max(size) < 200:
        pytest.skip("what it makes of so small a page is blurred further than its tokens are wide")
    page = sample_image(size, seed=3)
    layout = layout_of(model, encoder, page)
    before = embeddings(model, page)
    assert len(before) == len(layout)
    for detail in sorted(set(layout.detail)):
        # between rows mtmd puts what a graph left there times zero, and that may be NaN
        part = np.flatnonzero((layout.detail == detail) & np.isfinite(layout.rects[:, 0]))
        cells = layout.rects[part]
        sides = (cells[:, 2:] - cells[:, :2]).max(axis=0)
        # how far resizing blurs over an edge: bicubic 2 pixels of the coarser side, Lanczos 3, twice
        support = 6 if encoder.kind == "idefics3" else 2
        blur = support * max(1.0, float((sides / (encoder.patch * encoder.merge)).max())) + 1
        for box, inner, outer in boxes(size, blur, layout, detail):
            painted = page.copy()
            painted.paste(ImageOps.invert(page.crop(box)), box[:2])
            changed = set(np.flatnonzero((embeddings(model, painted) != before).any(axis=1))) & set(part)
            assert inner <= changed <= outer
            if inner == outer:
                assert changed == set(layout.covered(box, detail=detail))


def test_a_limit_for_the_tokens_of_an_image_moves_them(tmp_path: Path) -> None:
    """Pixtral's canvas is chosen by its number of tokens, which mtmd does not tell by rows and columns."""
    mmproj = write_mmproj(tmp_path / "m.gguf", "pixtral", 128)
    page = sample_image((300, 220), seed=3)
    n_rows = []
    for limits in ((None, None), (None, 60), (500, None)):
        loading = Loading(image_min_tokens=limits[0], image_max_tokens=limits[1])
        with VisionModel.load(test_model("llava").gguf(), mmproj, n_threads=1, loading=loading) as model:
            layout = layout_of(model, ImageEncoder(read_header(mmproj), limits), page)
        n_rows.append(1 + int(np.isnan(layout.rects[:, 0]).sum()))
        assert len(layout.covered((0, 0, 300, 220))) == len(layout) - n_rows[-1] + 1
    assert n_rows[1] < n_rows[0] < n_rows[2]


def test_what_is_laid_out_in_another_way_is_not_scored(
    seen: tuple[VisionModel, ImageEncoder], tmp_path: Path
) -> None:
    model, encoder = seen
    page = sample_image((300, 220), seed=3)
    with model.tokenize(image_marker(), [page]) as prompt:
        positions, grid = image_tokens(prompt)
    assert encoder.layout((220, 300), len(positions), grid)
    with pytest.raises(SparseMMError, match=r"an image of 300 x 220 takes .* tokens, .* were expected"):
        encoder.layout((220, 300), len(positions) + 1, grid)


def test_an_encoder_whose_tokens_have_no_known_place_is_refused(tmp_path: Path) -> None:
    path = write_mmproj(tmp_path / "resampler.gguf", "idefics3", 128, projector="resampler")
    with pytest.raises(SparseMMError) as caught:
        ImageEncoder(read_header(path))
    assert "image encoders of type 'resampler'" in str(caught.value)
    assert str(caught.value).endswith(", ".join(SUPPORTED))
    old = write_mmproj(tmp_path / "old.gguf", "idefics3", 128, preproc_image_size=0)
    with pytest.raises(SparseMMError, match=r"only for files with clip\.vision\.preproc_image_size"):
        ImageEncoder(read_header(old)).layout((100, 100), 0, (0, 0))
