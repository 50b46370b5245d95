"""Images that come again are not encoded again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from models import sample_image, test_model
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.mmproj import convert_mmproj
from sparsemm_edge.runtime import Conversation, Loading, VisionModel, generate
from sparsemm_edge.runtime.image_store import ImageStore
from sparsemm_edge.runtime.library import mtmd
from sparsemm_edge.runtime.prompt import ImagePart

QUESTION = "What is written here?"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """`encoded()`: how many images or tiles were encoded since the last call."""
    plain, count = mtmd.mtmd_encode_chunk, [0]

    def counting(*arguments: Any) -> Any:
        count[0] += 1
        return plain(*arguments)

    monkeypatch.setattr(mtmd, "mtmd_encode_chunk", counting)

    def since() -> int:
        found, count[0] = count[0], 0
        return found

    return since


@pytest.fixture
def load() -> Iterator[Callable[..., VisionModel]]:
    opened = []

    def load(image_cache: int, name: str = "llava") -> VisionModel:
        files, loading = test_model(name), Loading(image_cache=image_cache)
        opened.append(VisionModel.load(files.gguf(), files.mmproj(), n_threads=1, loading=loading))
        return opened[-1]

    yield load
    for model in opened:
        model.close()


def answers(model: VisionModel, seeds: list[list[int]], size: int) -> list[tuple[int, ...]]:
    """The answers to questions about pictures, by their seeds."""
    found = []
    for pictures in seeds:
        answer = generate(model, QUESTION, [sample_image(size, seed) for seed in pictures], n_predict=8)
        list(answer)
        found.append(answer.stats().tokens)
    return found


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_a_picture_is_encoded_once_whatever_stands_beside_it(
    name: str, load: Callable[..., VisionModel], encoded: Callable[[], int]
) -> None:
    asked = [[1], [1], [2, 1], [1, 1, 2], [3, 3]]
    size = test_model(name).image_size
    plain = answers(load(0, name), asked, size)
    assert encoded() == 9
    assert answers(load(64, name), asked, size) == plain
    assert encoded() == 3


def test_pictures_of_the_same_bytes_and_another_shape_are_others(
    load: Callable[..., VisionModel], encoded: Callable[[], int]
) -> None:
    model = load(64)
    picture = sample_image(64, 1)
    other = Image.frombytes("RGB", (32, 128), picture.tobytes())
    for image in (picture, other):
        list(generate(model, QUESTION, [image], n_predict=1))
    assert encoded() == 2


def test_the_tiles_of_a_picture_are_told_apart(tmp_path: Path, encoded: Callable[[], int]) -> None:
    """LLaVA-NeXT cuts a picture into tiles, in as many chunks."""
    files, hf_dir, mmproj = test_model("llava"), tmp_path / "hf", tmp_path / "mmproj.gguf"
    shutil.copytree(files.hf, hf_dir)
    config = json.loads((hf_dir / "config.json").read_text())
    config |= {"model_type": "llava_next", "image_grid_pinpoints": [[112, 224], [224, 112], [224, 224]]}
    (hf_dir / "config.json").write_text(json.dumps(config))
    weights = load_file(hf_dir / "model.safetensors") | {"image_newline": np.arange(128, dtype=np.float32)}
    save_file(weights, hf_dir / "model.safetensors")
    convert_mmproj(hf_dir, mmproj)
    with VisionModel.load(files.gguf(), mmproj, n_threads=1, loading=Loading(image_cache=64)) as model:
        images = [sample_image(200, 1), sample_image(200, 2), sample_image(200, 1)]
        with model.tokenize(model.chat_prompt(QUESTION, 3), images) as prompt:
            parts = [part for part in prompt.parts if isinstance(part, ImagePart)]
            keys = [part.key for part in parts]
            third = len(keys) // 3
            assert third > 1 and keys[:third] == keys[2 * third :]
            found = [model.encode_image(part) for part in parts]
            assert encoded() == len(set(keys)) == 2 * third
            model.image_store = ImageStore(0)
            for part, embeddings in zip(parts, found, strict=True):
                assert np.array_equal(model.encode_image(part), embeddings)


def test_what_was_not_used_longest_goes_first() -> None:
    store = ImageStore(3 * 400)
    keys = [(b"picture", tile) for tile in range(5)]
    for key in keys[:3]:
        store.put(key, np.full((10, 10), key[1], dtype=np.float32))
    assert store.n_bytes == 1200 and store.get(keys[0]) is not None
    store.put(keys[3], np.zeros((10, 10), dtype=np.float32))
    assert [store.get(key) is not None for key in keys] == [True, False, True, True, False]
    store.put(keys[4], np.zeros((20, 20), dtype=np.float32))  # larger than all of it
    assert (len(store), store.n_bytes) == (3, 1200)
    held = store.get(keys[2])
    assert held is not None and (held == 2).all()
    with pytest.raises(ValueError, match="read-only"):
        held[0, 0] = 1


def test_a_chat_that_begins_anew_does_not_encode_its_image_again(
    load: Callable[..., VisionModel], encoded: Callable[[], int]
) -> None:
    image = sample_image(test_model("llava").image_size, 1)
    with Conversation(load(64), n_ctx=1024) as conversation:
        for _ in range(3):
            list(conversation.ask(QUESTION, [image], n_predict=2))
            conversation.close()
    assert encoded() == 1


def test_the_bound_is_a_number() -> None:
    with pytest.raises(SparseMMError, match="image_cache is -1"):
        Loading(image_cache=-1)
