"""Geometry: paint a box on a page, and the image tokens that change are those that the mapping names.

What changes is asked of the real model. With the attention of its image encoder switched off, a token's
feature is made of its own patches, while all that cuts, packs, unpads and merges is transformers' own.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from helpers.boxes import boxes
from helpers.models import sample_image
from helpers.vision_models import ARCHITECTURES, make
from sparsemm_edge import SparseMMError
from sparsemm_edge.scoring import geometry
from sparsemm_edge.scoring.models import VisionLanguageModel, load

torch.set_num_threads(1)

PAGES = [(300, 220), (150, 400), (640, 180), (231, 97)]  # width, height
# How far a resize blurs over an edge, in pixels of the coarser side (bicubic; Idefics3: Lanczos, twice), and
# the pixels a side that a token shows of what was resized.
SUPPORT = {"idefics3": 6, "smolvlm": 6}
TOKEN_PIXELS = {
    "idefics3": 28,
    "smolvlm": 28,
    "internvl": 28,
    "qwen2-vl": 28,
    "qwen2.5-vl": 28,
    "qwen3-vl": 32,
}
_MIXING = re.compile(r"(out_proj|attn\.proj|projection_layer)\.(weight|bias)$")


@cache
def blinkered(name: str) -> VisionLanguageModel:
    """A model whose image encoder's patches do not see each other."""
    model = load(str(make(name, Path(mkdtemp()))))
    n_silenced = 0
    with torch.no_grad():
        for parameter_name, parameter in model.model.named_parameters():
            if "language_model" not in parameter_name and _MIXING.search(parameter_name):
                parameter.zero_()
                n_silenced += 1
    assert n_silenced >= 4
    return model


@torch.no_grad()
def features(model: VisionLanguageModel, page: Image.Image) -> np.ndarray:
    inputs = model.prompt("read", page).inputs
    taken = {
        key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    output = model.model.model.get_image_features(**taken).pooler_output
    rows = output if isinstance(output, torch.Tensor) else torch.cat(list(output))
    return rows.reshape(-1, rows.shape[-1]).numpy()


@pytest.mark.parametrize("size", PAGES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_painting_a_box_changes_exactly_the_tokens_that_show_it(name: str, size: tuple[int, int]) -> None:
    model = blinkered(name)
    page = sample_image(size, seed=3)
    layout = model.prompt("read", page).layout
    before = features(model, page)
    assert len(before) == len(layout)

    for detail in sorted(set(layout.detail)):
        part = np.flatnonzero(layout.detail == detail)
        cells = layout.rects[part][np.isfinite(layout.rects[part, 0])]
        sides = (cells[:, 2:] - cells[:, :2]).max(axis=0)
        blur = SUPPORT.get(name, 2) * max(1.0, float((sides / TOKEN_PIXELS.get(name, 14)).max())) + 1
        for box, inner, outer in boxes(size, blur, layout, detail):
            painted = page.copy()
            painted.paste(ImageOps.invert(page.crop(box)), box[:2])
            changed = set(np.flatnonzero((features(model, painted) != before).any(axis=1))) & set(part)
            assert inner <= changed <= outer
            if inner == outer:
                assert changed == set(layout.covered(box, detail=detail))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_of_a_page_tile_it_without_overlap(name: str) -> None:
    """Every part of the page that the model sees is shown by one token, or two where it interpolates."""
    layout = blinkered(name).prompt("read", sample_image((300, 220), seed=3)).layout
    centre = layout.covered((149.9, 109.9, 150.1, 110.1))
    assert 1 <= len(centre) <= 4
    assert len(layout.covered((0, 0, 300, 220))) > 12
    assert len(layout.covered((-50, -50, 0, 0))) == 0
    assert len(layout.covered((300, 0, 400, 220))) == 0


def test_what_is_cropped_away_has_no_tokens() -> None:
    layout = blinkered("llava").prompt("read", sample_image((640, 180), seed=3)).layout
    assert not len(layout.covered((0, 0, 200, 180)))
    assert len(layout.covered((230, 0, 410, 180))) == 64


def test_row_ends_and_the_smaller_copy_are_no_places_to_look() -> None:
    """LLaVA-NeXT: 64 tokens of the copy, then rows of the page, each with a token for its end."""
    layout = blinkered("llava-next").prompt("read", sample_image((224, 224), seed=3)).layout
    assert len(layout) == 64 + 16 * (16 + 1)
    everything = layout.covered((0, 0, 224, 224))
    assert everything.min() == 64
    assert not set(everything) & {64 + 17 * row + 16 for row in range(16)}
    assert list(layout.covered((0, 0, 14, 14))) == [64]
    assert list(layout.covered((14, 210, 42, 224))) == [64 + 17 * 15 + 1, 64 + 17 * 15 + 2]


@pytest.mark.parametrize("name", ["llava", "llava-padded", "llava-siglip", "llava-next", "idefics3"])
def test_the_prompt_is_the_one_that_the_whole_processor_makes(name: str, tmp_path: Path) -> None:
    """For the processors that transformers builds without torchvision."""
    transformers = pytest.importorskip("transformers")
    model = load(str(make(name, tmp_path)))
    page = sample_image((300, 220), seed=3)
    cls = getattr(transformers, type(model.model).__name__.replace("ForConditionalGeneration", "Processor"))
    clip = name != "llava-siglip"
    settings = (
        {"image_seq_len": 16}
        if name == "idefics3"
        else {
            "patch_size": 14,
            "vision_feature_select_strategy": "default" if clip else "full",
            "num_additional_image_tokens": int(clip),
        }
    )
    whole = cls(model.image_processor, model.tokenizer, **settings)
    text = model.question("read")
    expected = whole(images=[page], text=text, return_tensors="pt")
    ours = model.prompt("read", page).inputs
    for key in ("input_ids", "pixel_values"):
        torch.testing.assert_close(ours[key], expected[key], rtol=0, atol=0)


def test_a_processor_that_the_geometry_does_not_know_is_refused() -> None:
    with pytest.raises(SparseMMError, match="336 x 336 pixels of a page of 100 x 200, which its settings"):
        geometry.cropped_square(
            (100, 200),
            (336, 336),
            patch=14,
            resize={"shortest_edge": 224},
            pad_to_square=False,
            n_class_tokens=1,
            n_dropped=1,
        )


@pytest.mark.parametrize(
    ("page", "n_tiles", "expected"),
    [((100, 100), 1, (1, 1)), ((100, 200), 2, (1, 2)), ((300, 200), 6, (3, 2)), ((200, 310), 6, (2, 3))],
)
def test_tiles_are_laid_out_in_the_shape_nearest_to_the_page(
    page: tuple[int, int], n_tiles: int, expected: tuple[int, int]
) -> None:
    assert geometry.tiling(page, n_tiles) == expected
