"""Sizes of the buffers that llama.cpp would allocate, computed by llama.cpp without loading the weights."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sparsemm_edge.resources import usable_cores
from sparsemm_edge.runtime import library
from sparsemm_edge.runtime.context import cache_type, context_params
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.library import ContextSizes, llama
from sparsemm_edge.runtime.loading import Loading
from sparsemm_edge.runtime.model import VisionModel
from sparsemm_edge.runtime.prompt import image_marker


class Estimate(VisionModel):
    """A model loaded without its text model's weights, which cannot be run.

    Attributes:
        vision_compute_bytes: compute buffer of the image encoder, for the image that it is warmed up with.
    """

    def __init__(self, path: Path, mmproj: Path | None = None, n_gpu_layers: int | None = None) -> None:
        """Args:
        path, mmproj: GGUF files of the text model and its image encoder; None: text only.
        n_gpu_layers: see Loading.

        Raises:
            SparseMMError: llama-cpp-python without the patches, or a file that cannot be used.
        """
        library.require_patched()
        library.start(show_log=False)
        library.logged_buffers()
        super().__init__(path, mmproj, usable_cores(), Loading(n_gpu_layers=n_gpu_layers, no_weights=True))
        buffers = library.logged_buffers()
        self.vision_compute_bytes = sum(each.n_bytes for each in buffers if each.content == "vision")

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """KV cache positions of images of these (width, height) in pixels.

        With the markers around each and between its tiles.
        """
        counts = []
        for size in sizes:
            with self.tokenize(image_marker(), [Image.new("RGB", size)], first=False) as prompt:
                counts.append(prompt.n_tokens)
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
        """What a context takes, in bytes, for a prompt and n_predict tokens after it, one at a time.

        The other arguments are those of Context. No memory of that size is taken.

        Raises:
            SparseMMError: llama.cpp would not make this context.
        """
        types = (cache_type(type_k), cache_type(type_v))
        params = context_params(n_ctx, n_ubatch, *types, flash_attn, evicts=table is not None)
        context = library.new_context(self.pointer, params, table)
        try:
            return library.context_sizes(context, n_prompt, n_predict)
        finally:
            llama.llama_free(context)
