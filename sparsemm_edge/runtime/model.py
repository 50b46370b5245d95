"""A vision-language model in llama.cpp: load, tokenise, encode images. It knows no context."""

import ctypes
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sparsemm_edge.closing import Closing
from sparsemm_edge.errors import ContextFullError, SparseMMError, check_ranges
from sparsemm_edge.files import fingerprint
from sparsemm_edge.gguf_header import read_header, weight_bytes
from sparsemm_edge.gguf_metadata import model_shape, sparsemm_metadata
from sparsemm_edge.image_grid import ImageGrid
from sparsemm_edge.resources import usable_cores
from sparsemm_edge.runtime import builtin_templates, chat_template, image_file, library
from sparsemm_edge.runtime.chat_template import Turn
from sparsemm_edge.runtime.disk_cache import DiskCache
from sparsemm_edge.runtime.eviction import Eviction, HeadBudgetTable, plan
from sparsemm_edge.runtime.image_store import ImageKey, ImageStore
from sparsemm_edge.runtime.library import llama, mtmd
from sparsemm_edge.runtime.loading import Adapters, Loading
from sparsemm_edge.runtime.prompt import (
    ImagePart,
    Prompt,
    image_marker,
    tokenize_text,
    tokenize_with_images,
)
from sparsemm_edge.runtime.sampler import Sampler, Sampling


class VisionModel(Closing):
    """A text model with, or without, its image encoder.

        with VisionModel.load("model.sparsemm.gguf", "mmproj.gguf") as model:
            answer = generate(model, "What does the page say?", ["page.png"])
            for piece in answer:
                print(piece, end="", flush=True)
            print(answer.stats())

    Close it or use it in a `with`: it owns llama.cpp memory.

    Attributes:
        path: the text model's file.
        header: of that file.
        shape: layers, heads, head sizes.
        metadata: the file's head budgets, None if it was not converted.
        pointer: llama_model pointer.
        n_threads: threads.
        loading: how it was loaded.
        adapters: its LoRA adapters.
        image_store: encoded images in memory.
        disk_cache: encoded images in files; None: no cache.
        n_encoded: images and tiles that were encoded so far.
    """

    def __init__(self, path: Path, mmproj: Path | None, n_threads: int, loading: Loading) -> None:
        """Use VisionModel.load."""
        started = time.perf_counter()
        self.path = path
        self.n_threads = n_threads
        self.loading = loading
        self.image_store = ImageStore(loading.image_memory * 2**20)
        self.disk_cache: DiskCache | None = None
        if loading.image_cache is not None:
            self.disk_cache = DiskCache(Path(loading.image_cache), loading.image_cache_size * 2**20)
        self.n_encoded = 0
        self.pointer = 0
        self._mmproj = mmproj
        self._vision: int | None = None
        self._projector: str | None = None  # what kind it is
        self._n_patches = 0  # a side of the image encoder's picture in patches, 0 if it is not fixed
        try:
            self.header = read_header(path)
            self.shape = model_shape(self.header)
            self.metadata = sparsemm_metadata(self.header)
            self._load_text_model()
            if mmproj is not None:
                self._load_vision(mmproj)
        except BaseException:
            self.close()
            raise
        self.load_ms = (time.perf_counter() - started) * 1000

    @classmethod
    def load(
        cls,
        model: str | Path,
        mmproj: str | Path | None = None,
        *,
        n_threads: int | None = None,
        show_log: bool = False,
        loading: Loading | None = None,
    ) -> "VisionModel":
        """Load a model.

        Args:
            model: GGUF file of the text model.
            mmproj: GGUF file of its image encoder; None: text only.
            n_threads: None: the physical cores that this process may use.
            show_log: let llama.cpp log on stderr.
            loading: devices and how to load; None: llama.cpp's defaults.

        Raises:
            SparseMMError: llama-cpp-python without the patches, or a file that cannot be used.
        """
        check_ranges(n_threads=n_threads)
        library.require_patched()
        library.start(show_log)
        vision = Path(mmproj) if mmproj is not None else None
        return cls(Path(model), vision, n_threads or usable_cores(), loading or Loading())

    def close(self) -> None:
        if self._vision:
            mtmd.mtmd_free(self._vision)
            self._vision = None
        if self.pointer:
            llama.llama_model_free(self.pointer)
            self.pointer = 0

    def chat_prompt(
        self,
        prompt: str,
        n_images: int,
        chat_template: str | None = None,
        *,
        first: bool = True,
        system: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of one user message, see turns_prompt; `system` is a system message before it."""
        turns = [] if system is None else [Turn("system", system)]
        turns.append(Turn("user", prompt, n_images))
        return self.turns_prompt(turns, chat_template, first=first, template_options=template_options)

    def turns_prompt(
        self,
        turns: Sequence[Turn],
        template: str | None = None,
        *,
        first: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """Render turns with the chat template, with image_marker() for each image.

        Later turns begin with the text that ends the previous reply. `template` and
        `template_options`: see chat_template.render_turns; None: the model's own.
        """
        bos = self._token_text(llama.llama_vocab_bos(self._vocab))
        text = chat_template.render_turns(
            self._own_template() if template is None else template,
            turns,
            marker=image_marker(),
            bos=bos,
            eos=self._token_text(llama.llama_vocab_eos(self._vocab)),
            first=first,
            options=template_options,
        )
        # tokenising adds the begin token again
        return text.removeprefix(bos) if first and llama.llama_vocab_get_add_bos(self._vocab) else text

    def _own_template(self) -> str:
        found = llama.llama_model_chat_template(self.pointer, None)
        if found:
            return str(found.decode("utf-8", "replace"))
        names = builtin_templates.names()
        fits = builtin_templates.suggestion(self.path.name, self._projector)
        raise SparseMMError(
            f"{self.path} has no chat template: give one"
            + (f", such as --chat-template {fits}, which may be this model's" if fits is not None else "")
            + "; --chat-template takes jinja text, a file of it, or one of llama.cpp's names:"
            + f" {', '.join(names)}"
        )

    def tokenize(
        self, text: str, images: Sequence[str | Path | Image.Image] = (), *, first: bool = True
    ) -> Prompt:
        """Tokenise text with image_marker() for each image into tokens and image chunks.

        Without `first` no begin token is added.
        """
        if not images:
            return tokenize_text(self._vocab, text, first=first)
        if self._mmproj is None:
            raise SparseMMError("an image needs the model's image encoder: give its file with --mmproj")
        with_keys = bool(self.image_store.max_bytes) or self.disk_cache is not None
        return tokenize_with_images(self.vision, text, images, first=first, with_keys=with_keys)

    def plan(self, eviction: Eviction, n_prompt: int, n_later: int | None = None) -> HeadBudgetTable | None:
        """Eviction parameters for a prompt of this length, see eviction.plan."""
        return plan(eviction, self.metadata, self.shape, n_prompt, self.path, n_later)

    def n_ctx_for(self, prompt: Prompt, n_predict: int, n_ctx: int | None, before: int = 0) -> int:
        """Context size for the sequence so far, a prompt and its reply.

        Args:
            prompt: the prompt.
            n_predict: most tokens of the reply.
            n_ctx: the user's limit; None: as needed, up to the model's training length.
            before: positions already in use.

        Raises:
            ContextFullError: no room for a single token of the reply.
        """
        n_tokens, n_pos = before + prompt.n_tokens, before + prompt.n_pos
        if n_ctx is None:
            if n_pos >= self.n_ctx_train:
                raise ContextFullError(
                    f"the prompt takes {n_pos} positions, and {self.path} was trained for"
                    f" {self.n_ctx_train}; --n-ctx goes beyond that"
                )
            return n_tokens + min(n_predict, self.n_ctx_train - n_pos)
        if n_tokens >= n_ctx:
            raise ContextFullError(f"the prompt takes {n_tokens} positions, --n-ctx allows {n_ctx}")
        return n_ctx

    def sampler(self, sampling: Sampling, said: Sequence[int] = ()) -> Sampler:
        """Create a sampler; `said`: the tokens of the prompt's text, for the penalties."""
        return Sampler(sampling, self._vocab, said)

    def ends_turn(self, token: int) -> bool:
        """Whether a token ends the model's turn."""
        return bool(llama.llama_vocab_is_eog(self._vocab, token))

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens; control tokens have none."""
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")

    @property
    def vision(self) -> int:
        """mtmd_context pointer; reloads the image encoder if it was unloaded."""
        if self._mmproj is None:
            raise SparseMMError("the model was loaded without its image encoder")
        if self._vision is None:
            self._load_vision(self._mmproj)
        assert self._vision is not None
        return self._vision

    def free_encoder(self) -> None:
        """Free what only encoding needs: compute buffers and the last embeddings, or with
        Loading.unload_mmproj the weights too, until they are needed again."""
        if self._vision and self.loading.unload_mmproj:
            mtmd.mtmd_free(self._vision)
            self._vision = None
        elif self._vision:
            library.free_compute(self._vision)

    @cached_property
    def uses_mrope(self) -> bool:
        """Whether positions of image tokens have several dimensions."""
        return bool(mtmd.mtmd_decode_use_mrope(self.vision))

    @property
    def n_threads_batch(self) -> int:
        """Threads that read prompts."""
        return self.loading.n_threads_batch or self.n_threads

    @cached_property
    def vision_weight_bytes(self) -> int:
        """Bytes of the image encoder's weights; 0 without one."""
        return 0 if self._mmproj is None else weight_bytes(self._mmproj)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model file with its adapters; see files.fingerprint."""
        parts = [fingerprint(self.path)]
        parts += [f"{fingerprint(Path(lora.path))}={lora.scale}" for lora in self.loading.loras]
        return "+".join(parts)

    def encode_image(self, part: ImagePart) -> npt.NDArray[np.float32]:
        """Encode an image, or take it from a cache: [n_tokens, n_embd_inp]."""
        if part.key is None:
            return self._encode(part)
        if (held := self.image_store.get(part.key)) is not None:
            return held
        found, disk = None, self.disk_cache
        if disk is not None:
            name = f"{self.image_digest(part.key)}.image"
            found = disk.read(name, lambda path: image_file.read(path, part.n_tokens, self.n_embd_inp))
        if found is None:
            found = encoded = self._encode(part)
            if disk is not None:
                disk.write(name, lambda path: image_file.write(path, encoded))
        self.image_store.put(part.key, found)
        return found

    def image_digest(self, key: ImageKey) -> str:
        """A digest of an image's content, the encoder's file, and how the image is cut."""
        content, tile = key
        loading = self.loading
        layout = (loading.image_min_tokens, loading.image_max_tokens)
        known = (content.decode(), tile, self._mmproj_fingerprint, *layout, library.build())
        return hashlib.sha256(repr(known).encode()).hexdigest()

    @cached_property
    def _mmproj_fingerprint(self) -> str:
        return "" if self._mmproj is None else fingerprint(self._mmproj)

    def _encode(self, part: ImagePart) -> npt.NDArray[np.float32]:
        if mtmd.mtmd_encode_chunk(self.vision, part.chunk) != 0:
            raise library.failure("llama.cpp cannot encode the image")
        self.n_encoded += 1
        pointer = mtmd.mtmd_get_output_embd(self.vision)
        return np.ctypeslib.as_array(pointer, shape=(part.n_tokens, self.n_embd_inp)).copy()

    def is_non_causal(self, image: ImagePart) -> bool:
        """Whether the tokens of an image attend to those after them."""
        return bool(mtmd.mtmd_decode_use_non_causal(self.vision, image.chunk))

    def image_positions(self, image: ImagePart, n_past: int) -> npt.NDArray[np.int32]:
        """Positions of an image that starts at n_past: [n], with M-RoPE [4, n] (time, height, width, 0)."""
        if not self.uses_mrope:
            return np.arange(n_past, n_past + image.n_tokens, dtype=np.int32)
        found = (mtmd.mtmd_decoder_pos * image.n_tokens)()
        tokens = mtmd.mtmd_input_chunk_get_tokens_image(image.chunk)
        mtmd.mtmd_helper_image_get_decoder_pos(tokens, n_past, found)
        t, x, y, z = np.ctypeslib.as_array(found).view(np.uint32).reshape(-1, 4).T
        return np.stack([t, y, x, z]).astype(np.int32)

    def image_grid(self, prompt: Prompt) -> ImageGrid:
        """The grid of image tokens of a prompt with one image.

        Raises:
            SparseMMError: not exactly one image, or its tokens are not one grid (an image cut into tiles).
        """
        start = 0
        grids = []
        for part in prompt.parts:
            if isinstance(part, ImagePart):
                n_rows, n_columns = part.grid
                if n_rows == 1 and part.n_tokens == self._n_patches**2:  # without M-RoPE mtmd tells no rows
                    n_columns = n_rows = self._n_patches
                grids.append(ImageGrid(start, n_rows, n_columns, padded=not self.uses_mrope))
            start += part.n_tokens
        if len(grids) != 1:
            raise SparseMMError(f"a prompt of one image was expected, this one has {len(grids)}")
        if grids[0].n_rows == 1:
            raise SparseMMError(
                f"{self.path}: the {grids[0].n_columns} tokens of the image are not one grid of rows and"
                " columns (an image cut into tiles?)"
            )
        return grids[0]

    def _load_text_model(self) -> None:
        library.forget_errors()
        params = self.loading.model_params()
        self.pointer = llama.llama_model_load_from_file(os.fsencode(self.path), params) or 0
        if not self.pointer:
            raise library.failure(f"{self.path}: llama.cpp cannot load it")
        self._vocab = llama.llama_model_get_vocab(self.pointer)
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)
        self.n_embd_inp: int = llama.llama_model_n_embd_inp(self.pointer)
        self.n_ctx_train: int = llama.llama_model_n_ctx_train(self.pointer)
        self.adapters = Adapters(self.pointer, self.path, self.loading.loras)

    def _load_vision(self, mmproj: Path) -> None:
        header = read_header(mmproj)
        arch = header.value("general.architecture")
        if arch != "clip":
            raise SparseMMError(f"{mmproj}: not an image encoder (mmproj): its architecture is {arch!r}")
        kinds = (header.fields.get(f"clip.{key}projector_type") for key in ("", "vision."))
        self._projector = next((str(kind.value) for kind in kinds if kind is not None), None)
        size, patch = (header.fields.get(f"clip.vision.{key}_size") for key in ("image", "patch"))
        if size is not None and patch is not None:
            self._n_patches = size.value // patch.value
        params = mtmd.mtmd_context_params_default()
        params.n_threads = self.n_threads
        params.print_timings = False
        params.media_marker = image_marker().encode()
        self.loading.set_vision_params(params)
        library.forget_errors()
        self._vision = mtmd.mtmd_init_from_file(os.fsencode(mmproj), self.pointer, params)
        if not self._vision:
            raise library.failure(f"{mmproj}: cannot be used with {self.path}")
        if not mtmd.mtmd_support_vision(self._vision):
            raise SparseMMError(f"{mmproj}: holds no image encoder")

    def piece(self, token: int) -> bytes:
        """The bytes that a generated token stands for; nothing for control tokens."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _token_text(self, token: int) -> str:
        if token == llama.LLAMA_TOKEN_NULL:
            return ""
        return str(llama.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"))
