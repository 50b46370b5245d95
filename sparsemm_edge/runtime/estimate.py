"""Sizes of the buffers that llama.cpp would allocate, computed by llama.cpp without loading the weights."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sparsemm_edge.closing import Closing
from sparsemm_edge.gguf_header import GGUFHeader
from sparsemm_edge.runtime import library
from sparsemm_edge.runtime.context import cache_type, context_params
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.library import ContextSizes, llama, mtmd
from sparsemm_edge.runtime.loading import Loading
from sparsemm_edge.runtime.prompt import image_marker, tokenize_with_images


class Estimate(Closing):
    """A model loaded without weights, and its image encoder with weights.

    Close it or use it in a `with`: it owns llama.cpp memory.
    """

    def __init__(self, header: GGUFHeader, mmproj: Path | None, n_gpu_layers: int | None = None) -> None:
        """Args:
        header: of the text model's file.
        mmproj: GGUF file of its image encoder; None: text only.
        n_gpu_layers: see Loading.

        Raises:
            SparseMMError: llama-cpp-python without the patches, or a file that cannot be used.
        """
        library.require_patched()
        library.start(show_log=False)
        library.forget_errors()
        library.logged_buffers()
        self._header = header
        self._vision: int | None = None
        params = Loading(n_gpu_layers=n_gpu_layers).model_params()
        params.no_alloc = True
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self._model: int | None = llama.llama_model_load_from_file(os.fsencode(header.path), params)
        if not self._model:
            raise library.failure(f"{header.path}: llama.cpp cannot load it")
        if mmproj is not None:
            wanted = mtmd.mtmd_context_params_default()
            wanted.print_timings = False
            wanted.media_marker = image_marker().encode()
            wanted.warmup = True  # which reserves the compute buffer, and computes nothing
            self._vision = mtmd.mtmd_init_from_file(os.fsencode(mmproj), self._model, wanted)
            if not self._vision:
                self.close()
                raise library.failure(f"{mmproj}: cannot be used with {header.path}")
        self.vision_compute_bytes = sum(
            buffer.n_bytes for buffer in library.logged_buffers() if buffer.content == "vision"
        )
        """Compute buffer of the image encoder, for the image that it is warmed up with."""

    def close(self) -> None:
        if self._vision:
            mtmd.mtmd_free(self._vision)
            self._vision = None
        if self._model:
            llama.llama_model_free(self._model)
            self._model = None

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """KV cache positions of images of these (width, height) in pixels.

        With the markers around each and between its tiles.
        """
        assert self._vision is not None
        n_bos = int(llama.llama_vocab_get_add_bos(llama.llama_model_get_vocab(self._model)))
        counts = []
        for size in sizes:
            with tokenize_with_images(self._vision, image_marker(), [Image.new("RGB", size)]) as prompt:
                counts.append(prompt.n_tokens - n_bos)
        return counts

    def context_sizes(
        self,
        *,
        n_prompt: int,
        n_predict: int,
        n_ctx: int,
        n_ubatch: int,
        type_k: str = "f16",
        type_v: str = "f16",
        flash_attn: bool = True,
        table: HeadBudgetTable | None = None,
    ) -> ContextSizes:
        """What a context takes, in bytes, for a prompt and a reply.

        Args:
            n_prompt: positions of the prompt.
            n_predict: tokens decoded after it, one at a time.
            n_ctx: places in the KV cache.
            n_ubatch: prompt tokens computed at a time.
            type_k, type_v: cache types.
            flash_attn: whether attention is fused.
            table: what the context evicts by; None: the full cache.

        Raises:
            SparseMMError: llama.cpp would not make this context.
        """
        types = (cache_type(type_k), cache_type(type_v))
        params = context_params(n_ctx, n_ubatch, *types, flash_attn, evicts=table is not None)
        context = library.new_context(self._model or 0, params, table)
        try:
            return library.context_sizes(context, n_prompt, n_predict)
        finally:
            llama.llama_free(context)
