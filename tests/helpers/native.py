"""llama.cpp by its C functions, as little as the tests need: tokens, image embeddings, greedy answers.

The package's own runtime is what the tests test; this is the independent path beside it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp.llama_cpp as lib
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from PIL import Image

from sparsemm_edge.runtime.prompt import image_marker

MARKER = image_marker()

_silent = lib.llama_log_callback(lambda level, text, user_data: None)
lib.llama_log_set(_silent, ctypes.c_void_p(None))
mtmd.mtmd_log_set(_silent, ctypes.c_void_p(None))
mtmd.mtmd_helper_log_set(_silent, ctypes.c_void_p(None))


@dataclass(frozen=True)
class Chunk:
    """A run of text tokens, or one image.

    Attributes:
        tokens: the token ids of a text run; empty for an image.
        n_tokens: tokens that the run takes in the KV cache.
        n_pos: positions that it takes, which are fewer for an image under M-RoPE.
    """

    tokens: tuple[int, ...]
    n_tokens: int
    n_pos: int

    @property
    def is_image(self) -> bool:
        return not self.tokens


class Native:
    """A text model with its mmproj, both loaded through llama.cpp's C functions. A context manager."""

    def __init__(self, model: Path, mmproj: Path, *, n_threads: int = 1) -> None:
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.n_threads = n_threads
        self.model = lib.llama_model_load_from_file(str(model).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self.vocab = lib.llama_model_get_vocab(self.model)
        mparams = mtmd.mtmd_context_params_default()
        mparams.use_gpu = False
        mparams.print_timings = False
        mparams.n_threads = n_threads
        mparams.warmup = False
        mparams.media_marker = MARKER.encode()
        self.mtmd = mtmd.mtmd_init_from_file(str(mmproj).encode(), self.model, mparams)
        if not self.mtmd:
            raise RuntimeError(f"mtmd cannot load {mmproj}")

    def __enter__(self) -> Native:
        return self

    def __exit__(self, *exc: object) -> None:
        mtmd.mtmd_free(self.mtmd)
        lib.llama_model_free(self.model)

    # --- prompts

    def _tokenize(self, text: str, images: Sequence[Image.Image]) -> ctypes.c_void_p:
        bitmaps = []
        for image in images:
            rgb = np.ascontiguousarray(np.asarray(image.convert("RGB")))
            data = rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmaps.append(mtmd.mtmd_bitmap_init(rgb.shape[1], rgb.shape[0], data))
        encoded = text.encode()
        inp = mtmd.mtmd_input_text(text=encoded, text_len=len(encoded), add_special=True, parse_special=True)
        chunks = mtmd.mtmd_input_chunks_init()
        array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        status = mtmd.mtmd_tokenize(self.mtmd, chunks, ctypes.byref(inp), array, len(bitmaps))
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        if status != 0:
            raise RuntimeError(f"mtmd_tokenize returned {status} for {text!r}")
        return chunks

    def chunks(self, text: str, images: Sequence[Image.Image] = ()) -> list[Chunk]:
        """How llama.cpp splits a prompt; `MARKER` in `text` stands for the next image."""
        chunks = self._tokenize(text, images)
        found = []
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            tokens: tuple[int, ...] = ()
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                n = ctypes.c_size_t()
                ids = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
                tokens = tuple(ids[: n.value])
            found.append(
                Chunk(
                    tokens,
                    mtmd.mtmd_input_chunk_get_n_tokens(chunk),
                    mtmd.mtmd_input_chunk_get_n_pos(chunk),
                )
            )
        mtmd.mtmd_input_chunks_free(chunks)
        return found

    def image_embeddings(self, image: Image.Image) -> np.ndarray:
        """What the language model sees of an image: float32 [image tokens, n_embd]."""
        chunks = self._tokenize(MARKER, [image])
        rows = []
        n_embd = lib.llama_model_n_embd_inp(self.model)
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                continue
            if mtmd.mtmd_encode_chunk(self.mtmd, chunk) != 0:
                raise RuntimeError("mtmd_encode_chunk failed")
            n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            embd = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.mtmd), (n, n_embd))
            rows.append(embd.copy())
        mtmd.mtmd_input_chunks_free(chunks)
        return np.concatenate(rows)

    # --- answers

    def greedy(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        *,
        n_predict: int = 32,
        n_batch: int = 2048,
        n_ubatch: int | None = None,
        flash_attn: bool = True,
        type_kv: int = 0,
    ) -> tuple[list[int], np.ndarray]:
        """The most likely tokens after a prompt, and the logits they were chosen from.

        Args:
            type_kv: ggml type of the KV cache, 0 = f32, 1 = f16.

        Returns:
            `n_predict` token ids, and float32 logits [n_predict, n_vocab].
        """
        params = lib.llama_context_default_params()
        params.n_ctx = 2048
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch or n_batch
        params.n_threads = params.n_threads_batch = self.n_threads
        params.flash_attn_type = 1 if flash_attn else 0
        params.type_k = params.type_v = type_kv
        ctx = lib.llama_init_from_model(self.model, params)
        if not ctx:
            raise RuntimeError("llama.cpp cannot make a context")
        try:
            chunks = self._tokenize(text, images)
            n_past = lib.llama_pos(0)
            status = mtmd.mtmd_helper_eval_chunks(
                self.mtmd, ctx, chunks, 0, 0, n_batch, True, ctypes.byref(n_past)
            )
            mtmd.mtmd_input_chunks_free(chunks)
            if status != 0:
                raise RuntimeError(f"mtmd_helper_eval_chunks returned {status}")
            n_vocab = lib.llama_vocab_n_tokens(self.vocab)
            tokens: list[int] = []
            logits = np.empty((n_predict, n_vocab), np.float32)
            batch = lib.llama_batch_init(1, 0, 1)
            for i in range(n_predict):
                logits[i] = np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, -1), (n_vocab,))
                tokens.append(int(logits[i].argmax()))
                batch.n_tokens = 1
                batch.token[0] = tokens[-1]
                batch.pos[0] = n_past.value + i
                batch.n_seq_id[0] = 1
                batch.seq_id[0][0] = 0
                batch.logits[0] = 1
                if lib.llama_decode(ctx, batch) != 0:
                    raise RuntimeError("llama_decode failed")
            lib.llama_batch_free(batch)
            return tokens, logits
        finally:
            lib.llama_free(ctx)
