"""Options for loading a model: devices, memory mapping, LoRA adapters, image caches."""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemm_edge.defaults import IMAGE_CACHE_SIZE
from sparsemm_edge.errors import SparseMMError, check_attributes
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.runtime import library
from sparsemm_edge.runtime.library import llama


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter: its GGUF file, and how much of it is added to the weights."""

    path: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Parse FILE or FILE=SCALE."""
        path, found, scale = text.rpartition("=")
        if not found or Path(text).exists():
            return cls(text)
        try:
            return cls(path, float(scale))
        except ValueError as error:
            raise SparseMMError(
                f"--lora is {text!r}: expected a file, or FILE=SCALE with a number"
            ) from error

    def __post_init__(self) -> None:
        if not abs(self.scale) <= 1000:  # nor NaN
            raise SparseMMError(f"{self.path}: the scale of a LoRA is -1000 to 1000, not {self.scale}")


@dataclass(frozen=True)
class Loading:
    """Loading options; None uses llama.cpp's default.

    Attributes:
        n_threads_batch: threads for prompts; None: as for decoding.
        n_gpu_layers: layers on the GPU, if llama.cpp was built for one; -1: all of them.
        mmproj_offload: the image encoder runs on the GPU, if there is one.
        loras: adapters over the text model.
        image_min_tokens, image_max_tokens: least and most tokens of an image, where its size decides.
        mmap: memory-map the file.
        mlock: lock the weights in memory, if the system allows it.
        image_memory: MiB of encoded images kept in memory, see ImageStore.
        image_cache: a folder of encoded images, see DiskCache; None: none.
        image_cache_size: its size limit in MiB.
        unload_mmproj: free the image encoder after a prompt's images are encoded; reload it for the next.
        no_weights: load all but the text model's weights, and reserve the image encoder's buffers: for sizes.
    """

    n_threads_batch: int | None = None
    n_gpu_layers: int | None = None
    mmproj_offload: bool = True
    loras: tuple[Lora, ...] = ()
    image_min_tokens: int | None = None
    image_max_tokens: int | None = None
    mmap: bool = True
    mlock: bool = False
    image_memory: int = 0
    image_cache: str | None = None
    image_cache_size: int = IMAGE_CACHE_SIZE
    unload_mmproj: bool = False
    no_weights: bool = False

    def __post_init__(self) -> None:
        check_attributes(self)
        least, most = self.image_min_tokens, self.image_max_tokens
        if least is not None and most is not None and least > most:
            raise SparseMMError(f"image_min_tokens is {least}, more than image_max_tokens, {most}")

    def model_params(self) -> Any:
        """llama_model_params."""
        params = llama.llama_model_default_params()
        if self.n_gpu_layers is not None:
            params.n_gpu_layers = self.n_gpu_layers
        if self.mlock:
            params.load_mode = llama.LLAMA_LOAD_MODE_MMAP_MLOCK if self.mmap else llama.LLAMA_LOAD_MODE_MLOCK
        elif not self.mmap or self.no_weights:
            params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        params.no_alloc = self.no_weights
        return params

    def set_vision_params(self, params: Any) -> None:
        """Put what concerns the image encoder into mtmd_context_params."""
        params.use_gpu = self.mmproj_offload
        params.warmup = self.no_weights  # which reserves the compute buffer, and computes nothing
        if self.image_min_tokens is not None:
            params.image_min_tokens = self.image_min_tokens
        if self.image_max_tokens is not None:
            params.image_max_tokens = self.image_max_tokens


class Adapters:
    """The LoRA adapters of a model. llama.cpp frees them with it."""

    def __init__(self, model: int, path: Path, loras: Sequence[Lora]) -> None:
        """Args:
        model: llama_model pointer.
        path: the model's file, for messages.
        loras: the adapters.

        Raises:
            SparseMMError: an adapter that cannot be used with this model.
        """
        pointers = []
        for lora in loras:
            read_header(Path(lora.path))
            library.forget_errors()
            pointer = llama.llama_adapter_lora_init(model, os.fsencode(lora.path))
            if not pointer:
                raise library.failure(f"{lora.path}: cannot be used as a LoRA of {path}")
            pointers.append(pointer)
        self._pointers = (llama.llama_adapter_lora_p_ctypes * len(loras))(*pointers)
        self._scales = (ctypes.c_float * len(loras))(*(lora.scale for lora in loras))

    def apply(self, context: int) -> None:
        """Apply them to this llama_context pointer."""
        if len(self._pointers):
            llama.llama_set_adapters_lora(context, self._pointers, len(self._pointers), self._scales)
