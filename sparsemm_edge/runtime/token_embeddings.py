"""Single rows of a GGUF file's token embeddings, without reading the rest."""

import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

from sparsemm_edge.gguf_header import GGUFHeader

TENSOR = "token_embd.weight"

# Architectures whose graph (llama.cpp 0c1e57098, src/models/) takes token embeddings as they are in the file:
# neither scaled (granite, minicpm) nor normalised. Text given to them as embeddings is then the same as text
# given as tokens. The two with deepstack (qwen3vl*) take more numbers a token, which are zero for text.
PLAIN_EMBEDDINGS = (
    "internlm2",
    "llama",
    "mistral3",
    "phi3",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen3moe",
    "qwen3vl",
    "qwen3vlmoe",
)


class TokenEmbeddings:
    """The rows of `token_embd.weight`."""

    def __init__(self, header: GGUFHeader) -> None:
        """Args:
        header: of a GGUF file that has TENSOR.
        """
        tensor = header.tensors[TENSOR]
        self._type = tensor.type
        self.n_embd, n_vocab = tensor.shape
        self._rows = np.memmap(
            tensor.path,
            dtype=np.uint8,
            mode="r",
            offset=tensor.start,
            shape=(n_vocab, (tensor.end - tensor.start) // n_vocab),
        )

    def rows(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """The embeddings of these tokens: [n, n_embd]."""
        return dequantize(self._rows[tokens], self._type).reshape(len(tokens), self.n_embd)
