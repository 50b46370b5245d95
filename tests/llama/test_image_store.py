"""Images that come again are not encoded again."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from helpers.command_line import CommandLine
from helpers.models import sample_image, test_model
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.mmproj import convert_mmproj
from sparsemm_edge.runtime import (
    Conversation,
    Eviction,
    Loading,
    VisionModel,
    context_for,
    encode,
    generate,
    image_file,
    library,
)
from sparsemm_edge.runtime.disk_cache import DiskCache
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

    def load(image_memory: int, name: str = "llava") -> VisionModel:
        files, loading = test_model(name), Loading(image_memory=image_memory)
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
    with VisionModel.load(files.gguf(), mmproj, n_threads=1, loading=Loading(image_memory=64)) as model:
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
    with pytest.raises(SparseMMError, match="image_memory is -1"):
        Loading(image_memory=-1)


# --- in files


@pytest.fixture
def ask(tmp_path: Path, encoded: Callable[[], int]) -> Callable[..., tuple[tuple[int, ...], int]]:
    """`ask(seed)` loads the model anew and asks about a picture: the answer, and how many were encoded."""

    def ask(seed: int, name: str = "llava", mmproj: str = "f16", **options: Any) -> Any:
        files, loading = test_model(name), Loading(image_cache=str(tmp_path / "kept"), **options)
        with VisionModel.load(files.gguf(), files.mmproj(mmproj), n_threads=1, loading=loading) as model:
            found = answers(model, [[seed]], files.image_size)[0]
            count = encoded()
            assert count == model.n_encoded
        return found, count

    return ask


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_another_process_does_not_encode_a_kept_picture_and_answers_alike(
    name: str, ask: Callable[..., Any], load: Callable[..., VisionModel], encoded: Callable[[], int]
) -> None:
    plain = answers(load(0, name), [[1]], test_model(name).image_size)[0]
    assert encoded() == 1
    assert [ask(1, name), ask(1, name), ask(2, name)[1]] == [(plain, 1), (plain, 0), 1]


def test_what_another_encoder_or_another_size_made_is_not_taken(ask: Callable[..., Any]) -> None:
    assert ask(1)[1] == 1
    assert ask(1, mmproj="f32")[1] == 1
    assert ask(1, image_max_tokens=32)[1] == 1
    assert ask(1)[1] == 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "is damaged, it has 32767 bytes, expected 32768"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged, it has changed since it was saved"),
        (lambda data: data.replace(b'"n_tokens": 64', b'"n_tokens": 32'), "64 x 128 numbers were expected"),
        (
            lambda data: data.replace(b'"version": 2', b'"version": 9'),
            "a kept image of version 9, this reads 2",
        ),
        (lambda data: b"", "not a kept image"),
        (lambda data: b"\xff" * 5000, "not a kept image"),
        (lambda data: b"[" * 10000, "not a kept image"),
        (lambda data: b"[]\n", "not a kept image"),
    ],
)
def test_a_damaged_file_is_one_line_and_written_again(
    damage: Callable[[bytes], bytes],
    reason: str,
    ask: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer, _ = ask(1)
    (path,) = (tmp_path / "kept").iterdir()
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert not caplog.records

    assert ask(1) == (answer, 1)

    (line,) = caplog.messages
    assert line.startswith(f"warning: {path}: ") and reason in line and "\n" not in line
    assert path.read_bytes() == data and list(path.parent.iterdir()) == [path]
    assert ask(1) == (answer, 0)


def test_the_folder_is_bounded_and_what_was_not_used_longest_goes(
    ask: Callable[..., Any], tmp_path: Path
) -> None:
    folder, stranger = tmp_path / "kept", tmp_path / "kept" / "notes.txt"
    for seed in (1, 2, 3):
        assert ask(seed)[1] == 1
    size = sum(path.stat().st_size for path in folder.iterdir()) // 3
    stranger.write_bytes(bytes(10 * size))  # no file of the cache: neither counted nor removed
    left = folder / ".0.image.1.part"  # of a process that was killed
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert ask(1)[1] == 0  # so that 2 is what was not used longest

    cache = DiskCache(folder, 3 * size + 100)
    cache.write("0.image", lambda path: image_file.write(path, np.zeros((64, 128), np.float32)))

    assert len([path for path in folder.iterdir() if path.suffix == ".image"]) == 3
    assert stranger.exists() and not left.exists()
    assert [ask(1)[1], ask(3)[1], ask(2)[1]] == [0, 0, 1]


def test_a_folder_that_cannot_be_written_does_not_keep_an_answer(
    ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    answer, n = ask(1)
    assert n == 1 and len(answer) > 0
    (line,) = caplog.messages
    assert "No space left on device; it is not kept" in line
    assert list((tmp_path / "kept").iterdir()) == []


def test_generate_keeps_images_in_a_folder(tmp_path: Path, sparsemm: CommandLine) -> None:
    files, page = test_model("llava"), tmp_path / "page.png"
    sample_image(files.image_size, 1).save(page)
    command = ("generate", "-m", files.gguf(), "--mmproj", files.mmproj(), "--image", page, "-p", QUESTION)
    kept = ("--image-cache", tmp_path / "kept", "--json", "-n", 4)

    first, second = sparsemm(*command, *kept).report, sparsemm(*command, *kept).report

    assert first["tokens"] == second["tokens"] and len(list((tmp_path / "kept").iterdir())) == 1
    assert "--image-memory" in sparsemm(*command, "--image-cache", "256").refusal
    (tmp_path / "file").touch()
    assert (
        f"cannot make the folder {tmp_path / 'file'}"
        in sparsemm(*command, "--image-cache", tmp_path / "file").refusal
    )


# --- memory of the image encoder


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc's malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks"]
    ]
    _fields_ += [(name, ctypes.c_size_t) for name in ["fsmblks", "uordblks", "fordblks", "keepcost"]]


def mallinfo() -> MallInfo:
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallInfo
    return cast(MallInfo, ask())


def allocated() -> int:
    """Bytes that malloc has handed out and not got back."""
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc tells what is allocated")
def test_the_encoder_keeps_no_compute_buffer_and_encodes_again_as_before(load: Callable[..., Any]) -> None:
    model = load(0, "qwen2vl")
    with model.tokenize(model.chat_prompt(QUESTION, 1), [sample_image(448, 1)]) as prompt:
        part = next(part for part in prompt.parts if isinstance(part, ImagePart))
        library.logged_buffers()
        first = model.encode_image(part)
        size = sum(buffer.n_bytes for buffer in library.logged_buffers() if buffer.content == "vision")
        held = allocated()
        model.free_encoder()
        assert size > 2**20 and held - allocated() > 0.9 * size + first.nbytes
        assert np.array_equal(model.encode_image(part), first)

        # reading a prompt leaves none either
        model.free_encoder()
        before = allocated()
        with context_for(model, prompt, n_predict=1, eviction=Eviction(False)) as context:
            context.prefill(encode(model, prompt))
        assert allocated() - before < size / 2


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's malloc is the one to be told"
)
def test_freed_buffers_of_a_layer_leave_no_holes_in_the_heap(load: Callable[..., Any]) -> None:
    load(0)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    libc.free(libc.malloc(30 * 2**20))  # after which glibc, left to itself, would put 8 MiB on the heap
    gc.collect()
    before, size = mallinfo().hblkhd, 8 * 2**20

    def n_blocks() -> int:
        """Outside the heap, to a whole block: other threads may give back something smaller."""
        return round((mallinfo().hblkhd - before) / size)

    blocks = [libc.malloc(size) for _ in range(4)]
    assert n_blocks() == 4
    for block in blocks[:3]:
        libc.free(block)
    assert n_blocks() == 1
    libc.free(blocks[3])
