"""Tokenised prompts: text tokens, and image chunks cut and resized by mtmd."""

import ctypes
import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from sparsemm_edge.closing import Closing
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import check_text
from sparsemm_edge.pictures import open_picture
from sparsemm_edge.runtime import library
from sparsemm_edge.runtime.image_store import ImageKey
from sparsemm_edge.runtime.library import llama, mtmd


@dataclass(frozen=True)
class TextPart:
    """tokens: [n] ids."""

    tokens: npt.NDArray[np.int32]

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_pos(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ImagePart:
    """One image, or one tile of it.

    Attributes:
        chunk: mtmd_input_chunk pointer, owned by the prompt.
        n_tokens: embeddings, one KV cache position each.
        n_pos: how far positions advance; less than n_tokens with M-RoPE.
        key: identifies its content, if requested; see ImageStore.
    """

    chunk: int
    n_tokens: int
    n_pos: int
    key: ImageKey | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of its tokens where positions have both (M-RoPE), else 1 and n_tokens."""
        tokens = mtmd.mtmd_input_chunk_get_tokens_image(self.chunk)
        return mtmd.mtmd_image_tokens_get_ny(tokens), mtmd.mtmd_image_tokens_get_nx(tokens)


class Prompt(Closing):
    """A tokenised prompt. Close it or use it in a `with`: it owns llama.cpp memory.

    Attributes:
        parts: text and images in order.
        n_tokens: KV cache positions.
        n_pos: the position after the last one.
        images_ms: time that decoding, cutting and resizing its images took.
    """

    def __init__(
        self, parts: Sequence[TextPart | ImagePart], chunks: int | None = None, images_ms: float = 0.0
    ) -> None:
        self.parts = tuple(parts)
        self.images_ms = images_ms
        self.n_tokens = sum(part.n_tokens for part in parts)
        self.n_pos = sum(part.n_pos for part in parts)
        self._chunks = chunks

    def prepend(self, tokens: Sequence[int]) -> None:
        """Insert tokens at the start of the prompt."""
        if not tokens:
            return
        before, parts = np.array(tokens, dtype=np.int32), self.parts
        if parts and isinstance(parts[0], TextPart):
            before, parts = np.concatenate([before, parts[0].tokens]), parts[1:]
        self.parts = (TextPart(before), *parts)
        self.n_tokens += len(tokens)
        self.n_pos += len(tokens)

    def at_last_image(self) -> tuple["Prompt", npt.NDArray[np.int32]]:
        """The prompt up to the end of its last image, and the tokens of the text after it: [n].

        The first half lives as long as this prompt; without an image it is empty.
        """
        end = max((i for i, part in enumerate(self.parts, 1) if isinstance(part, ImagePart)), default=0)
        after = [part.tokens for part in self.parts[end:] if isinstance(part, TextPart)]
        return Prompt(self.parts[:end]), np.concatenate([np.empty(0, dtype=np.int32), *after])

    def close(self) -> None:
        if self._chunks is not None:
            mtmd.mtmd_input_chunks_free(self._chunks)
            self._chunks = None
            self.parts = ()


def tokenize_text(vocab: int, text: str, *, first: bool = True) -> Prompt:
    """A prompt without images; special tokens are parsed.

    Args:
        vocab: llama_vocab pointer.
        text: the prompt.
        first: whether it begins the sequence: the begin token is added if the model wants one.
    """
    data = _utf8(text)
    tokens = np.empty(len(data) + 16, dtype=np.int32)
    pointer = tokens.ctypes.data_as(llama.llama_token_p)
    n = llama.llama_tokenize(vocab, data, len(data), pointer, len(tokens), first, True)
    if n < 1:
        raise SparseMMError("the prompt is empty")
    return Prompt([TextPart(tokens[:n].copy())])


def tokenize_with_images(
    vision: int,
    text: str,
    images: Sequence[str | Path | Image.Image],
    *,
    first: bool = True,
    with_keys: bool = False,
) -> Prompt:
    """A prompt whose text holds one marker (image_marker) for each image.

    Args:
        vision: mtmd_context pointer.
        text, first: as in tokenize_text.
        images: files or pictures, in the markers' order.
        with_keys: whether to compute the images' keys, which takes milliseconds.
    """
    started = time.perf_counter()
    pictures = [read_image(image) for image in images]
    bitmaps: list[int] = []
    contents: Counter[bytes] = Counter()
    chunks = mtmd.mtmd_input_chunks_init()
    try:
        for picture in pictures:
            pixels = (ctypes.c_uint8 * picture.size).from_buffer_copy(picture.tobytes())
            height, width, _ = picture.shape
            bitmaps.append(mtmd.mtmd_bitmap_init(width, height, pixels))
            if with_keys:
                content = hashlib.sha256(f"{width} {height} ".encode() + picture.tobytes()).hexdigest()
                contents[content.encode()] += 1
                mtmd.mtmd_bitmap_set_id(bitmaps[-1], content.encode())
        data = _utf8(text)
        given = mtmd.mtmd_input_text(text=data, text_len=len(data), add_special=first, parse_special=True)
        array = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
        if mtmd.mtmd_tokenize(vision, chunks, ctypes.byref(given), array, len(bitmaps)) != 0:
            raise library.failure("llama.cpp cannot prepare the prompt's images")
        parts = _parts(chunks, contents)
        return Prompt(parts, chunks, images_ms=(time.perf_counter() - started) * 1000)
    except BaseException:
        mtmd.mtmd_input_chunks_free(chunks)
        raise
    finally:
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)


def _utf8(text: str) -> bytes:
    check_text(text, "the prompt")
    return text.encode("utf-8")


_MARKER = f"<image-{secrets.token_hex(16)}>"


def image_marker() -> str:
    """Marks an image in the text of tokenize_with_images; random, so that no text contains it by chance."""
    return _MARKER


def read_image(image: str | Path | Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels of an image: [height, width, 3] RGB, as pictures.open_picture makes it.

    Raises:
        SparseMMError: no such file, or not an image.
    """
    return np.asarray(open_picture(image))


def _parts(chunks: int, contents: Counter[bytes]) -> list[TextPart | ImagePart]:
    """Split mtmd's chunks into parts. `contents` counts the images of each content."""
    found = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
    ids = [_image_id(chunk) for chunk in found]
    n_chunks, seen = Counter(ids), Counter[bytes]()
    parts: list[TextPart | ImagePart] = []
    for chunk, content in zip(found, ids, strict=True):
        if content is None:
            n = ctypes.c_size_t()
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
            parts.append(TextPart(np.array(tokens[: n.value], dtype=np.int32)))
            continue
        key = None
        if contents[content]:  # the tiles of a picture come in the same order each time
            key = (content, seen[content] % (n_chunks[content] // contents[content]))
            seen[content] += 1
        n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        parts.append(ImagePart(chunk, n_tokens, mtmd.mtmd_input_chunk_get_n_pos(chunk), key))
    return parts


def _image_id(chunk: int) -> bytes | None:
    """The id of the image that a chunk is a tile of; None for text."""
    if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
        return None
    return mtmd.mtmd_input_chunk_get_id(chunk) or b""
