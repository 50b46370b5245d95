"""Record what a GGUF model's heads attend to while llama.cpp answers."""

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import check_supported
from sparsemm_edge.runtime import VisionModel
from sparsemm_edge.runtime.attention import StrongestPositions
from sparsemm_edge.runtime.context import Context, n_ubatch_for
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.library import llama
from sparsemm_edge.runtime.prompt import ImagePart, Prompt
from sparsemm_edge.scoring.mtmd_layout import ImageEncoder
from sparsemm_edge.scoring.target_response import Answer

N_UBATCH = 256
"""Prompt tokens computed at a time. The attention weights of so many queries are held at once."""


class GgufReader:
    """A Reader on llama.cpp, with the full cache and without flash attention."""

    def __init__(self, model: VisionModel, mmproj: Path, chat_template: str | None = None) -> None:
        """Args:
            model: loaded with its image encoder; must outlive this.
            mmproj: the image encoder's file.
            chat_template: instead of the model's.

        Raises:
            SparseMMError: the model's heads cannot be scored.
        """
        check_supported(model.header, model.shape)
        limits = (model.loading.image_min_tokens, model.loading.image_max_tokens)
        self._encoder = ImageEncoder(read_header(mmproj), limits)
        self._model = model
        self._template = chat_template
        self.n_layer = model.shape.n_layer
        self.n_head = model.shape.n_head
        self.n_head_kv = model.shape.n_head_kv
        n_layer = int(llama.llama_model_n_layer(model.pointer))
        self._attention = StrongestPositions(n_layer, self.n_head, model.shape.layer_numbers)

    def read(self, question: str, page: Image.Image, max_new_tokens: int) -> Answer:
        """The greedy answer to a question about a page, and the strongest positions of each head.

        Raises:
            SparseMMError: the model has no chat template, or the page does not fit into its context.
        """
        self._attention.stopped = False
        with ThreadPoolExecutor(1) as pool:  # so that Ctrl-C does not wait for a whole prompt
            reading = pool.submit(self._read, question, page, max_new_tokens)
            try:
                return reading.result()
            except BaseException:
                self._attention.stopped = True
                while not reading.done():  # the model must not be freed while it is in use, even on Ctrl-C
                    with suppress(KeyboardInterrupt, SystemExit):
                        wait([reading])
                raise

    def decode(self, tokens: list[int]) -> str:
        return self._model.text_of(tokens)

    def n_text_tokens(self, text: str) -> int:
        return self._model.tokenize(text, first=False).n_tokens if text else 0

    def _read(self, question: str, page: Image.Image, max_new_tokens: int) -> Answer:
        model, page = self._model, page.convert("RGB")
        with model.tokenize(model.chat_prompt(question, 1, self._template), [page]) as prompt:
            positions, grid = image_tokens(prompt)
            layout = self._encoder.layout((page.height, page.width), len(positions), grid)
            limit = max(1, min(max_new_tokens, model.n_ctx_train - prompt.n_pos))
            tokens: list[int] = []
            strongest = []
            with Context(
                model,
                n_ctx=model.n_ctx_for(prompt, limit, None),
                n_ubatch=n_ubatch_for(model, prompt, N_UBATCH),
                flash_attn=False,
                attention=self._attention,
            ) as context:
                context.prefill(encode(model, prompt))
                while True:
                    strongest.append(self._attention.take())
                    tokens.append(int(context.logits().argmax()))
                    if len(tokens) == limit or model.ends_turn(tokens[-1]):
                        return Answer(tokens, np.stack(strongest), positions, layout)
                    context.decode(tokens[-1])


def image_tokens(prompt: Prompt) -> tuple[npt.NDArray[np.int64], tuple[int, int]]:
    """The positions of a prompt's image tokens, and the rows and columns of its first image or tile."""
    images = [part for part in prompt.parts if isinstance(part, ImagePart)]
    is_image = np.repeat(
        [isinstance(part, ImagePart) for part in prompt.parts], [part.n_tokens for part in prompt.parts]
    )
    return np.flatnonzero(is_image), images[0].grid
