"""A vision-language model in llama.cpp: load, ask about images, read off what it took."""

import codecs
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import check_supported, model_shape, sparsemm_metadata
from sparsemm_edge.kept_map import ImageGrid
from sparsemm_edge.runtime import chat_template, library
from sparsemm_edge.runtime.eviction import Eviction, HeadBudgetTable, plan
from sparsemm_edge.runtime.library import llama, mtmd
from sparsemm_edge.runtime.prompt import (
    ImagePart,
    Prompt,
    image_marker,
    tokenize_text,
    tokenize_with_images,
)
from sparsemm_edge.runtime.session import KVStats, Session, cache_type
from sparsemm_edge.runtime.token_embeddings import PLAIN_EMBEDDINGS, TENSOR, TokenEmbeddings

# llama.cpp's own defaults for sampling with a temperature
_TOP_K, _TOP_P, _MIN_P = 40, 0.95, 0.05


@dataclass(frozen=True)
class Timings:
    """Milliseconds. decode_ms_per_token is a mean over the decoded tokens, None if there was none."""

    load_ms: float
    image_ms: float
    prompt_ms: float
    decode_ms_per_token: float | None


@dataclass(frozen=True)
class GenerationStats:
    """What one generation took.

    Attributes:
        tokens: ids of the generated tokens, without the end token.
        n_prompt: places of the prompt in the KV cache.
        kv, timings: bytes and milliseconds.
        rss_peak_bytes: the largest resident size of this process so far.
    """

    tokens: tuple[int, ...]
    n_prompt: int
    kv: KVStats
    timings: Timings
    rss_peak_bytes: int

    @property
    def n_generated(self) -> int:
        return len(self.tokens)

    def figures(self, text: str) -> dict[str, Any]:
        """The figures as `generate --json` prints them, with the generated text."""
        return {
            "text": text,
            "tokens": list(self.tokens),
            "n_prompt": self.n_prompt,
            "n_generated": self.n_generated,
            "kv": asdict(self.kv),
            "timings": asdict(self.timings),
            "rss_peak_bytes": self.rss_peak_bytes,
        }


class VisionModel:
    """A text model with, or without, its image encoder.

        with VisionModel.load("model.sparsemm.gguf", "mmproj.gguf") as model:
            for piece in model.generate("What does the page say?", ["page.png"]):
                print(piece, end="", flush=True)
            print(model.stats())

    Close it, or use it in a `with`: it owns memory of llama.cpp.

    Attributes:
        path: the text model's file.
        shape: layers, heads, head sizes.
        metadata: the file's head budgets, None if it was not converted.
        pointer: llama_model pointer.
        n_threads: threads for everything.
    """

    def __init__(self, path: Path, mmproj: Path | None, n_threads: int) -> None:
        """Use VisionModel.load."""
        started = time.perf_counter()
        self.path = path
        self.n_threads = n_threads
        self.pointer = 0
        self._vision: int | None = None
        self._n_patches = 0  # a side of the image encoder's picture in patches, 0 if it is not fixed
        self._stats: GenerationStats | None = None
        try:
            self._header = read_header(path)
            self.shape = model_shape(self._header)
            self.metadata = sparsemm_metadata(self._header)
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
    ) -> "VisionModel":
        """Load a model.

        Args:
            model: GGUF file of the text model.
            mmproj: GGUF file of its image encoder; None: text only.
            n_threads: None: the physical cores that this process may use.
            show_log: let llama.cpp log on stderr.

        Raises:
            SparseMMError: llama-cpp-python without the patches, or a file that cannot be used.
        """
        if n_threads is not None and n_threads < 1:
            raise SparseMMError(f"n_threads is {n_threads}: it must be at least 1")
        library.require_patched()
        library.start(show_log)
        vision = Path(mmproj) if mmproj is not None else None
        return cls(Path(model), vision, n_threads or usable_cores())

    def close(self) -> None:
        if self._vision:
            mtmd.mtmd_free(self._vision)
            self._vision = None
        if self.pointer:
            llama.llama_model_free(self.pointer)
            self.pointer = 0

    def __enter__(self) -> "VisionModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompt: str,
        images: Sequence[str | Path | Image.Image] = (),
        *,
        n_predict: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        n_ctx: int | None = None,
        n_ubatch: int | None = None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        chat_template: str | None = None,
        eviction: Eviction | None = None,
    ) -> Iterator[str]:
        """Answer one user message, piece by piece; stats() tells afterwards what it took.

        Args:
            prompt: what the user asks.
            images: files or pictures that the message shows before the text.
            n_predict: most tokens to generate.
            temperature: 0 takes the likeliest token; above 0 samples.
            seed: for sampling.
            n_ctx: most positions of prompt and reply together; None: as many as they need.
            n_ubatch: prompt tokens computed at a time; None: all of them, which lets an evicting cache share
                one layer's memory over all layers while it reads the prompt.
            cache_type_k, cache_type_v: f16, f32, bf16 or q8_0.
            chat_template: jinja text to use instead of the model's own template.
            eviction: None: as the model file says.

        Yields:
            Text, never half a character.

        Raises:
            SparseMMError: an image that cannot be read, an image encoder or chat template that is missing,
                a prompt longer than the context, or an argument out of its range.
        """
        if temperature < 0:
            raise SparseMMError(f"the temperature is {temperature}: it must be 0 or above")
        if not 0 <= seed < 2**32:
            raise SparseMMError(f"the seed is {seed}: it must be 0 to {2**32 - 1}")
        with (
            self.tokenize(self.chat_prompt(prompt, len(images), chat_template), images) as tokenized,
            self.start(
                tokenized,
                n_predict=n_predict,
                n_ctx=n_ctx,
                n_ubatch=n_ubatch,
                cache_type_k=cache_type_k,
                cache_type_v=cache_type_v,
                eviction=eviction,
            ) as session,
        ):
            session.read_prompt()
            room = llama.llama_n_ctx(session.context) if n_ctx is None else n_ctx
            n_predict = min(n_predict, room - tokenized.n_tokens)
            yield from self._reply(session, tokenized.n_tokens, n_predict, temperature, seed)

    def stats(self) -> GenerationStats:
        """What the last generation took, as far as it went."""
        if self._stats is None:
            raise SparseMMError("nothing was generated yet")
        return self._stats

    def chat_prompt(self, prompt: str, n_images: int, template: str | None = None) -> str:
        """The text of one user message in the model's chat template, with image_marker() for each image."""
        if template is None:
            found = llama.llama_model_chat_template(self.pointer, None)
            if not found:
                raise SparseMMError(
                    f"{self.path} has no chat template: give one with --chat-template (jinja text or a file)"
                )
            template = found.decode("utf-8", "replace")
        bos = self._token_text(llama.llama_vocab_bos(self._vocab))
        text = chat_template.render(
            template,
            prompt,
            n_images,
            marker=image_marker(),
            bos=bos,
            eos=self._token_text(llama.llama_vocab_eos(self._vocab)),
        )
        # tokenising adds the begin token again
        return text.removeprefix(bos) if llama.llama_vocab_get_add_bos(self._vocab) else text

    def tokenize(self, text: str, images: Sequence[str | Path | Image.Image] = ()) -> Prompt:
        """Text with image_marker() where its images go, as tokens and image chunks."""
        if not images:
            return tokenize_text(self._vocab, text)
        if self._vision is None:
            raise SparseMMError("an image needs the model's image encoder: give its file with --mmproj")
        return tokenize_with_images(self._vision, text, images)

    def start(
        self,
        prompt: Prompt,
        *,
        n_predict: int,
        n_ctx: int | None = None,
        n_ubatch: int | None = None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        eviction: Eviction | None = None,
        one_batch: bool = True,
        flash_attn: bool = True,
        on_phase: Callable[[str], None] | None = None,
    ) -> Session:
        """A session that is about to read this prompt; arguments as for generate and Session."""
        for name, value in (("n_predict", n_predict), ("n_ctx", n_ctx), ("n_ubatch", n_ubatch)):
            if value is not None and value < 1:
                raise SparseMMError(f"{name} is {value}: it must be at least 1")
        cache_type(cache_type_k), cache_type(cache_type_v)
        if n_ctx is None:
            if prompt.n_pos >= self.n_ctx_train:
                raise SparseMMError(
                    f"the prompt takes {prompt.n_pos} positions, and {self.path} was trained for"
                    f" {self.n_ctx_train}; --n-ctx goes beyond that"
                )
            n_ctx = prompt.n_tokens + min(n_predict, self.n_ctx_train - prompt.n_pos)
        elif prompt.n_tokens >= n_ctx:
            raise SparseMMError(f"the prompt takes {prompt.n_tokens} positions, --n-ctx allows {n_ctx}")

        table = plan(eviction or Eviction(), self.metadata, self.shape, prompt.n_tokens, self.path)
        if table is not None:
            check_supported(self._header, self.shape)
            library.set_head_budgets(self.pointer, table.head_budgets, table.window, table.pool_kernel)
        library.set_head_eviction(self.pointer, table is not None)
        return Session(
            self,
            prompt,
            n_ctx=n_ctx,
            n_ubatch=n_ubatch,
            cache_type_k=cache_type_k,
            cache_type_v=cache_type_v,
            one_batch=one_batch,
            flash_attn=flash_attn,
            on_phase=on_phase,
        )

    def start_with(self, prompt: Prompt, table: HeadBudgetTable | None, **options: Any) -> Session:
        """A session that evicts by this table, None: keeps the whole cache; options as for Session."""
        if table is not None:
            check_supported(self._header, self.shape)
            library.set_head_budgets(self.pointer, table.head_budgets, table.window, table.pool_kernel)
        library.set_head_eviction(self.pointer, table is not None)
        return Session(self, prompt, **options)

    def ends_turn(self, token: int) -> bool:
        """Whether a token ends the model's turn."""
        return bool(llama.llama_vocab_is_eog(self._vocab, token))

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens; control tokens have none."""
        return b"".join(self._piece(token) for token in tokens).decode("utf-8", "replace")

    @property
    def vision(self) -> int:
        """mtmd_context pointer."""
        if self._vision is None:
            raise SparseMMError("the model was loaded without its image encoder")
        return self._vision

    @property
    def uses_mrope(self) -> bool:
        """Whether positions of image tokens have several dimensions."""
        return bool(mtmd.mtmd_decode_use_mrope(self.vision))

    @cached_property
    def token_embeddings(self) -> TokenEmbeddings:
        return TokenEmbeddings(self._header)

    def encode_image(self, part: ImagePart) -> npt.NDArray[np.float32]:
        """An image through the vision tower and the projector: [n_tokens, n_embd_inp]."""
        if mtmd.mtmd_encode_chunk(self.vision, part.chunk) != 0:
            raise library.failure("llama.cpp cannot encode the image")
        pointer = mtmd.mtmd_get_output_embd(self.vision)
        return np.ctypeslib.as_array(pointer, shape=(part.n_tokens, self.n_embd_inp)).copy()

    def takes_embeddings(self, images: Sequence[ImagePart]) -> bool:
        """Whether text may be given as embeddings together with these images, with the same result."""
        known = self.shape.arch in PLAIN_EMBEDDINGS and TENSOR in self._header.tensors
        return known and not any(self.is_non_causal(image) for image in images)

    def is_non_causal(self, image: ImagePart) -> bool:
        """Whether the tokens of an image attend to those after them."""
        return bool(mtmd.mtmd_decode_use_non_causal(self.vision, image.chunk))

    def image_grid(self, prompt: Prompt) -> ImageGrid:
        """Where the tokens of a prompt's one image are in the sequence.

        Raises:
            SparseMMError: not exactly one image, or its tokens are not one grid (an image cut into tiles).
        """
        start = 0
        grids = []
        for part in prompt.parts:
            if isinstance(part, ImagePart):
                tokens = mtmd.mtmd_input_chunk_get_tokens_image(part.chunk)
                n_columns = int(mtmd.mtmd_image_tokens_get_nx(tokens))
                n_rows = int(mtmd.mtmd_image_tokens_get_ny(tokens))
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
        params = llama.llama_model_default_params()
        self.pointer = llama.llama_model_load_from_file(os.fsencode(self.path), params) or 0
        if not self.pointer:
            raise library.failure(f"{self.path}: llama.cpp cannot load it")
        self._vocab = llama.llama_model_get_vocab(self.pointer)
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)
        self.n_embd_inp: int = llama.llama_model_n_embd_inp(self.pointer)
        self.n_ctx_train: int = llama.llama_model_n_ctx_train(self.pointer)

    def _load_vision(self, mmproj: Path) -> None:
        header = read_header(mmproj)
        arch = header.value("general.architecture")
        if arch != "clip":
            raise SparseMMError(f"{mmproj}: not an image encoder (mmproj): its architecture is {arch!r}")
        size, patch = (header.fields.get(f"clip.vision.{key}_size") for key in ("image", "patch"))
        if size is not None and patch is not None:
            self._n_patches = size.value // patch.value
        params = mtmd.mtmd_context_params_default()
        params.n_threads = self.n_threads
        params.print_timings = False
        params.warmup = False
        library.forget_errors()
        self._vision = mtmd.mtmd_init_from_file(os.fsencode(mmproj), self.pointer, params)
        if not self._vision:
            raise library.failure(f"{mmproj}: cannot be used with {self.path}")
        if not mtmd.mtmd_support_vision(self._vision):
            raise SparseMMError(f"{mmproj}: holds no image encoder")

    def _reply(
        self, session: Session, n_prompt: int, n_predict: int, temperature: float, seed: int
    ) -> Iterator[str]:
        """Sample and decode until the model ends its turn or n_predict tokens are there."""
        tokens: list[int] = []
        decode_ms: list[float] = []
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        sampler = _sampler(temperature, seed)
        try:
            while len(tokens) < n_predict:
                started = time.perf_counter()
                if tokens:
                    session.decode(tokens[-1])
                token = llama.llama_sampler_sample(sampler, session.context, -1)
                if tokens:
                    decode_ms.append((time.perf_counter() - started) * 1000)
                if self.ends_turn(token):
                    break
                tokens.append(token)
                if piece := text.decode(self._piece(token)):
                    yield piece
            if rest := text.decode(b"", final=True):
                yield rest
        finally:
            llama.llama_sampler_free(sampler)
            per_token = sum(decode_ms) / len(decode_ms) if decode_ms else None
            timings = Timings(self.load_ms, session.image_ms, session.prompt_ms, per_token)
            self._stats = GenerationStats(
                tuple(tokens), n_prompt, session.kv_stats(), timings, rss_peak_bytes()
            )

    def _piece(self, token: int) -> bytes:
        """The bytes that a token stands for; nothing for control tokens."""
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


def _sampler(temperature: float, seed: int) -> Any:
    """llama_sampler pointer, to be freed: greedy at temperature 0."""
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    if temperature <= 0:
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_greedy())
    else:
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_top_k(_TOP_K))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_top_p(_TOP_P, 1))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_min_p(_MIN_P, 1))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(temperature))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(seed))
    return chain


def usable_cores() -> int:
    """The physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))


def rss_peak_bytes() -> int:
    """The largest resident size of this process so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
