"""Prompts as llama_decode takes them: token ids, or the embeddings of an image, and their positions."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sparsemm_edge.runtime.first_token import Part
from sparsemm_edge.runtime.model import VisionModel
from sparsemm_edge.runtime.prompt import ImagePart, Prompt


class Cancelled(Exception):
    """The caller cancelled a prompt; the context is unchanged."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What one llama_decode call reads: a run of text, or an image or one tile of it.

    Attributes:
        content: int32 [n] token ids, or float32 [n, n_embd_inp] embeddings.
        positions: int32 [n], or [4, n] for embeddings under M-RoPE (time, height, width, 0).
        n_past: the position after it.
        non_causal: whether its tokens attend to those after them; it is then read as a whole.
    """

    content: npt.NDArray[np.int32] | npt.NDArray[np.float32]
    positions: npt.NDArray[np.int32]
    n_past: int
    non_causal: bool = False

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, part: slice) -> "Batch":
        positions = np.ascontiguousarray(self.positions[..., part])
        return Batch(self.content[part], positions, self.n_past, self.non_causal)


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt with its images encoded. It needs neither the Prompt nor the image encoder any more.

    Attributes:
        batches: what it consists of, in order.
        vision: time to encode its images.
    """

    batches: tuple[Batch, ...]
    vision: Part = field(default_factory=Part)

    @property
    def n_tokens(self) -> int:
        return sum(len(batch) for batch in self.batches)

    @property
    def n_uncut(self) -> int:
        """Tokens of the largest batch that is read as a whole."""
        return max((len(batch) for batch in self.batches if batch.non_causal), default=0)

    def split(self, n_tokens: int) -> "tuple[EncodedPrompt, EncodedPrompt]":
        """The first n_tokens, and the rest, which continues a context that holds them."""
        before: list[Batch] = []
        after: list[Batch] = []
        for batch in self.batches:
            n = min(n_tokens, len(batch))
            n_tokens -= n
            before += [batch[:n]] if n else []
            after += [batch[n:]] if n < len(batch) else []
        return EncodedPrompt(tuple(before), self.vision), EncodedPrompt(tuple(after))


def encode(
    model: VisionModel, prompt: Prompt, n_past: int = 0, cancelled: Callable[[], bool] | None = None
) -> EncodedPrompt:
    """Encode the images of a prompt. The encoder's buffers are freed afterwards, or the encoder is unloaded.

    Args:
        model: the model that tokenised it.
        prompt: the prompt.
        n_past: the first position.
        cancelled: polled before each image; True cancels.

    Raises:
        Cancelled: `cancelled` returned True.
        SparseMMError: llama.cpp failed.
    """
    batches, ms, n_encoded = [], 0.0, model.n_encoded
    for part in prompt.parts:
        if not isinstance(part, ImagePart):
            batches.append(text_batch(part.tokens, n_past))
        else:
            if cancelled is not None and cancelled():
                raise Cancelled
            started = time.perf_counter()
            embeddings = model.encode_image(part)
            ms += (time.perf_counter() - started) * 1000
            positions = model.image_positions(part, n_past)
            batches.append(Batch(embeddings, positions, n_past + part.n_pos, model.is_non_causal(part)))
        n_past = batches[-1].n_past
    if any(isinstance(part, ImagePart) for part in prompt.parts):
        model.free_encoder()
    n_encoded = model.n_encoded - n_encoded
    return EncodedPrompt(tuple(batches), Part(ms, model.n_threads, n_encoded * model.vision_weight_bytes))


def encode_text(tokens: npt.NDArray[np.int32], n_past: int) -> EncodedPrompt:
    """Text alone, from position n_past on."""
    return EncodedPrompt((text_batch(tokens, n_past),))


def n_uncut(model: VisionModel, prompt: Prompt) -> int:
    """EncodedPrompt.n_uncut of a prompt, before its images are encoded."""
    images = (part for part in prompt.parts if isinstance(part, ImagePart))
    return max((part.n_tokens for part in images if model.is_non_causal(part)), default=0)


def text_batch(tokens: npt.NDArray[np.int32], n_past: int) -> Batch:
    """Tokens [n] of text, from position n_past on."""
    end = n_past + len(tokens)
    return Batch(tokens, np.arange(n_past, end, dtype=np.int32), end)
