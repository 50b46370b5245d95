"""Models of real shapes with random weights, to measure memory and speed without the real model.

Speed and memory depend on a model's shape and data type, not on the values of its weights.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import quantize

from sparsemm_edge.errors import SparseMMError, os_errors
from sparsemm_edge.files import atomic_path
from sparsemm_edge.gguf_header import bytes_of
from sparsemm_edge.gguf_metadata import ModelShape, SparseMMMetadata
from sparsemm_edge.scores import HeadScores

PUBLISHED_SCORES = Path(__file__).parents[2] / "scores" / "llava-v1.6-vicuna-7b.head-scores.json"
"""Head scores of LLaVA-NeXT-Vicuna-7B, where the package lies in a checkout."""

_WEIGHTS = GGMLQuantizationType.Q4_0
_N_ROWS = 256  # a matrix repeats this many random rows
_SEED = 0
# of scores as concentrated as the published: the top 5 % hold 56 % (55), the top 10 % 76 % (77)
_GAMMA = 0.12


@dataclass(frozen=True)
class TextShape:
    """The shape of a text model.

    Attributes:
        arch: architecture, as llama.cpp calls it.
        n_layer, n_embd, n_head, n_head_kv, n_ff, n_vocab: as in the GGUF keys.
        n_ctx: its training context.
        rope_base: of the rotary positions.
        rms_eps: of the norms.
        tied: whether the output matrix is the token embeddings.
        vocab: the vocabulary of llama.cpp's models/ggml-vocab-<vocab>.gguf.
        qkv_bias: whether the query, key and value projections have biases.
        rope_sections: of M-RoPE: time, height, width, unused; empty without.
        n_embd_head: size of one key of one head; None: n_embd / n_head.
        rotary_factor: fraction of it that is rotated.
        qk_norm: whether queries and keys are normed.
        n_deepstack: layers that add features of the image encoder.
        full_every: one layer of so many has full attention; the others are recurrent or have a window.
        n_swa: their sliding window in positions; 0: they are recurrent.
    """

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx: int
    rope_base: float
    rms_eps: float
    tied: bool
    vocab: str
    qkv_bias: bool = False
    rope_sections: tuple[int, ...] = ()
    n_embd_head: int | None = None
    rotary_factor: float = 1.0
    qk_norm: bool = False
    n_deepstack: int = 0
    full_every: int = 1
    n_swa: int = 0

    @property
    def head_dim(self) -> int:
        return self.n_embd_head or self.n_embd // self.n_head

    def model_shape(self, name: str) -> ModelShape:
        """The parts that determine the KV cache."""
        full = tuple(range(self.full_every - 1, self.n_layer, self.full_every))
        return ModelShape(
            arch=self.arch,
            name=name,
            n_layer=len(full),
            n_head=self.n_head,
            n_head_kv=self.n_head_kv,
            n_embd_head_k=self.head_dim,
            n_embd_head_v=self.head_dim,
            layers=None if self.full_every == 1 else full,
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, output dimension first. Vectors are f32, matrices _WEIGHTS."""
        n_q, n_kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.n_vocab, self.n_embd)}
        for layer in range(self.n_layer):
            block: dict[str, tuple[int, ...]] = {
                "attn_norm.weight": (self.n_embd,),
                "ffn_norm.weight": (self.n_embd,),
                "attn_q.weight": (n_q, self.n_embd),
                "attn_k.weight": (n_kv, self.n_embd),
                "attn_v.weight": (n_kv, self.n_embd),
                "attn_output.weight": (self.n_embd, n_q),
                "ffn_down.weight": (self.n_embd, self.n_ff),
            }
            if self.qkv_bias:
                block |= {"attn_q.bias": (n_q,), "attn_k.bias": (n_kv,), "attn_v.bias": (n_kv,)}
            if self.qk_norm:
                block |= {"attn_q_norm.weight": (self.head_dim,), "attn_k_norm.weight": (self.head_dim,)}
            if self.arch in ("glm4", "gemma3"):  # norms on both sides
                block["post_attention_norm.weight"] = block["post_ffw_norm.weight"] = (self.n_embd,)
            if self.arch == "glm4":  # gate and up in one
                block["ffn_up.weight"] = (2 * self.n_ff, self.n_embd)
            else:
                block["ffn_gate.weight"] = block["ffn_up.weight"] = (self.n_ff, self.n_embd)
            if self.arch == "qwen35":
                block["post_attention_norm.weight"] = block.pop("ffn_norm.weight")
                if (layer + 1) % self.full_every:
                    block = {key: dims for key, dims in block.items() if not key.startswith("attn_")}
                    block |= self._delta_net()
                else:
                    block["attn_q.weight"] = (2 * n_q, self.n_embd)  # with a gate for what is attended
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        shapes["output_norm.weight"] = (self.n_embd,)
        if not self.tied:
            shapes["output.weight"] = (self.n_vocab, self.n_embd)
        return shapes

    def _delta_net(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a recurrent layer of Qwen3.5."""
        n_k, n_v = _DELTA_NET["group_count"] * _DELTA_NET["state_size"], _DELTA_NET["inner_size"]
        n_head, kernel = _DELTA_NET["time_step_rank"], _DELTA_NET["conv_kernel"]
        return {
            "attn_norm.weight": (self.n_embd,),
            "attn_qkv.weight": (2 * n_k + n_v, self.n_embd),
            "attn_gate.weight": (n_v, self.n_embd),
            "ssm_conv1d.weight": (2 * n_k + n_v, kernel),
            "ssm_dt.bias": (n_head,),
            "ssm_a": (n_head,),
            "ssm_beta.weight": (n_head, self.n_embd),
            "ssm_alpha.weight": (n_head, self.n_embd),
            "ssm_norm.weight": (_DELTA_NET["state_size"],),
            "ssm_out.weight": (self.n_embd, n_v),
        }

    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(_tensor_bytes(shape) for shape in self.tensors().values())


# of the recurrent layers of Qwen3.5-4B and 9B, by their keys in a GGUF file
_DELTA_NET = {
    "conv_kernel": 4,
    "inner_size": 4096,
    "state_size": 128,
    "time_step_rank": 32,
    "group_count": 16,
}

# From the checkpoints' published config.json: arch, n_layer, n_embd, n_head, n_head_kv, n_ff, n_vocab, n_ctx,
# rope_base, rms_eps, tied and vocab, then what only some have.
# fmt: off
_VICUNA = TextShape("llama",   32, 4096, 32, 32, 11008,  32000,   4096, 1e4, 1e-5, False, "llama-spm")
_QWEN2 = TextShape("qwen2vl",  28, 3584, 28,  4, 18944, 152064,  32768, 1e6, 1e-6, False, "qwen2",
                   qkv_bias=True, rope_sections=(16, 24, 24, 0))
_QWEN3 = TextShape("qwen3",    36, 4096, 32,  8, 12288, 151936,  40960, 1e6, 1e-6, False, "qwen2",
                   n_embd_head=128, qk_norm=True)
_QWEN3_VL = replace(_QWEN3, arch="qwen3vl", n_ctx=262144, rope_base=5e6,
                    rope_sections=(24, 20, 20, 0), n_deepstack=3)
_QWEN35 = TextShape("qwen35",  32, 4096, 16,  4, 12288, 248320, 262144, 1e7, 1e-6, False, "qwen35",
                    rope_sections=(11, 11, 10, 0), n_embd_head=256, rotary_factor=0.25, qk_norm=True,
                    full_every=4)
_GLM4 = TextShape("glm4",      40, 4096, 32,  2, 13696, 151552,  65536, 1e4, 1e-5, False, "llama-bpe",
                  qkv_bias=True, rope_sections=(8, 12, 12, 0), rotary_factor=0.5)
_GEMMA3 = TextShape("gemma3",  34, 2560,  8,  4, 10240, 262208, 131072, 1e6, 1e-6, True, "llama-spm",
                    n_embd_head=256, qk_norm=True, full_every=6, n_swa=1024)
_SMOLLM2 = TextShape("llama",  24, 2048, 32, 32,  8192,  49280,   8192, 273768, 1e-5, False, "llama-spm")

SHAPES: dict[str, TextShape] = {
    "llava-1.5-7b": _VICUNA,
    "llava-1.5-13b": replace(_VICUNA, n_layer=40, n_embd=5120, n_head=40, n_head_kv=40, n_ff=13824),
    "llava-next-7b": _VICUNA,
    "llava-next-mistral-7b": replace(_VICUNA, n_head_kv=8, n_ff=14336, n_ctx=32768, rope_base=1e6),
    "qwen2-vl-2b": replace(_QWEN2, n_embd=1536, n_head=12, n_head_kv=2, n_ff=8960, n_vocab=151936, tied=True),
    "qwen2-vl-7b": _QWEN2,
    "qwen2.5-vl-3b": replace(_QWEN2, n_layer=36, n_embd=2048, n_head=16, n_head_kv=2, n_ff=11008,
                             n_vocab=151936, n_ctx=128000, tied=True),
    "qwen2.5-vl-7b": replace(_QWEN2, n_ctx=128000),
    "qwen3-vl-2b": replace(_QWEN3_VL, n_layer=28, n_embd=2048, n_head=16, n_ff=6144, tied=True),
    "qwen3-vl-4b": replace(_QWEN3_VL, n_embd=2560, n_ff=9728, tied=True),
    "qwen3-vl-8b": _QWEN3_VL,
    "internvl3.5-8b": _QWEN3,
    "glm-4.1v-9b": _GLM4,
    "qwen3.5-4b": replace(_QWEN35, n_embd=2560, n_ff=9216, tied=True),
    "qwen3.5-9b": _QWEN35,
    "gemma-3-4b": _GEMMA3,
    "smolvlm2-2.2b": _SMOLLM2,
}
# fmt: on
"""The text models of vision-language models, by the names that `bench --shape` takes."""


def find_shape(name: str, n_layer: int | None) -> TextShape:
    """The shape of this name, with only n_layer layers.

    Raises:
        SparseMMError: no such shape, or not so many layers.
    """
    if name not in SHAPES:
        raise SparseMMError(f"unknown shape {name!r}: expected one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    if n_layer is None:
        return shape
    if not shape.full_every <= n_layer <= shape.n_layer:
        least = shape.full_every
        raise SparseMMError(
            f"{name} has {shape.n_layer} layers: --layers {n_layer} is not among {least} to them"
        )
    return replace(shape, n_layer=n_layer)


def cache_dir(name: str) -> Path:
    """A folder in the user's cache: `bench-models` made here, `source` as the build script unpacks it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "sparsemm-edge" / name


def model_of_shape(
    name: str, shape: TextShape, folder: Path, progress: Callable[[float], None] | None = None
) -> Path:
    """A GGUF file of this shape, Q4_0, created in the folder if it does not exist.

    Args:
        name: what to call it.
        shape: its shape.
        folder: where it is looked for and made.
        progress: called with the fraction written.

    Raises:
        SparseMMError: the disk has no room for it.
    """
    vocab = _find_vocabulary(shape.vocab)
    key = sha256(repr((astuple(shape), _WEIGHTS, _N_ROWS, _SEED, vocab is not None)).encode()).hexdigest()
    path = folder / f"{name}-{shape.n_layer}-layers-{key[:8]}.gguf"
    if path.exists():
        return path
    with os_errors(f"make the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    needed, free = shape.weight_bytes() + 2**26, shutil.disk_usage(folder).free
    if needed > free:
        raise SparseMMError(
            f"{path} would take {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free:"
            " cut the model with --layers, or set XDG_CACHE_HOME to a larger disk"
        )
    written, total = 0, shape.weight_bytes()
    with atomic_path(path) as part, closing(_write_header(part, name, shape, vocab)) as writer:
        for data in _data(shape.tensors()):
            writer.write_tensor_data(data)
            written += data.nbytes
            if progress is not None:
                progress(written / total)
    return path


@contextmanager
def header_of_shape(name: str, shape: TextShape) -> Iterator[Path]:
    """A temporary GGUF file of this shape, to compute memory from.

    Its weights are a hole in a sparse file, so it cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.gguf"
        _write_header(path, name, shape, None).close()
        sizes = [path.stat().st_size, *map(_tensor_bytes, shape.tensors().values())]
        os.truncate(path, sum(-(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT for size in sizes))
        yield path


def _find_vocabulary(name: str) -> Path | None:
    """llama.cpp's file of this vocabulary, if the pinned source is unpacked on this machine."""
    sources = sorted(cache_dir("source").glob("*/vendor/llama.cpp"))
    if stated := os.environ.get("SPARSEMM_LLAMA_CPP_SOURCE"):
        sources.insert(0, Path(stated))
    files = (source / "models" / f"ggml-vocab-{name}.gguf" for source in sources)
    return next((file for file in files if file.is_file()), None)


def head_scores(shape: ModelShape) -> tuple[HeadScores, str]:
    """Head scores for a model without its own, and a description of their source."""
    if PUBLISHED_SCORES.is_file() and (shape.n_head, shape.n_head_kv) == (32, 32):
        published = HeadScores.load(PUBLISHED_SCORES)
        if shape.n_layer <= published.n_layer:
            cut = "" if shape.n_layer == published.n_layer else f", its first {shape.n_layer} layers"
            scores = replace(published, scores=published.scores[: shape.n_layer])
            return scores, f"published scores of {published.model}{cut}"
    drawn = np.random.default_rng(_SEED).gamma(_GAMMA, size=(shape.n_layer, shape.n_head))
    return (
        HeadScores("synthetic", drawn, provenance={"dataset": "none"}),
        "synthetic scores, as concentrated as the published ones of LLaVA-NeXT-Vicuna-7B",
    )


@contextmanager
def scores_file(
    shape: ModelShape, metadata: SparseMMMetadata | None, given: Path | None
) -> Iterator[tuple[Path | None, str]]:
    """A file of head scores, None for those in the model file; and a description of their source.

    A model without scores gets those of head_scores, in a temporary file.
    """
    if given is not None:
        yield given, str(given)
    elif metadata is not None:
        yield None, "the model file"
    else:
        scores, source = head_scores(shape)
        with tempfile.TemporaryDirectory() as folder:
            scores.save(Path(folder) / "scores.json")
            yield Path(folder) / "scores.json", source


def _write_header(path: Path, name: str, shape: TextShape, vocab: Path | None) -> GGUFWriter:
    """Begin the file: all but the tensors' data, which goes through the writer, one tensor at a time."""
    writer = GGUFWriter(path, shape.arch)
    writer.add_name(f"{name}, {shape.n_layer} layers, random weights")
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(int(shape.head_dim * shape.rotary_factor))
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.n_vocab)
    if shape.rope_sections:
        writer.add_rope_dimension_sections(list(shape.rope_sections))
    if shape.n_swa:
        writer.add_sliding_window(shape.n_swa)
    elif shape.full_every > 1:
        writer.add_uint32(f"{shape.arch}.full_attention_interval", shape.full_every)
        for key, value in _DELTA_NET.items():
            writer.add_uint32(f"{shape.arch}.ssm.{key}", value)
    if shape.n_deepstack:
        writer.add_num_deepstack_layers(shape.n_deepstack)
    if vocab is None:
        _add_made_up_vocabulary(writer, shape.n_vocab)
    else:
        _add_vocabulary(writer, vocab, shape.n_vocab)

    for tensor, dims in shape.tensors().items():
        writer.add_tensor_info(tensor, dims, np.dtype(np.float32), _tensor_bytes(dims), _data_type(dims))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _data(tensors: dict[str, tuple[int, ...]]) -> Iterator[npt.NDArray[Any]]:
    """Yield tensor data in order: ones for norms, zeros for biases, random rows for matrices."""
    rng = np.random.default_rng(_SEED)
    rows: dict[int, npt.NDArray[np.uint8]] = {}  # by length
    for name, dims in tensors.items():
        if _data_type(dims) != _WEIGHTS:
            value = -1 if name.endswith("ssm_a") else int(not name.endswith(".bias"))  # a: of a decay
            yield np.full(dims, value, dtype=np.float32)
            continue
        n_out, n_in = dims
        if n_in not in rows:
            drawn = rng.standard_normal((_N_ROWS, n_in), dtype=np.float32) / np.sqrt(n_in)
            rows[n_in] = quantize(drawn, _WEIGHTS)
        yield rows[n_in][rng.integers(0, _N_ROWS, n_out)]


def _add_vocabulary(writer: GGUFWriter, vocab: Path, n_vocab: int) -> None:
    """Copy a vocabulary's keys, with unused tokens up to n_vocab."""
    fields = {key: field for key, field in GGUFReader(vocab).fields.items() if key.startswith("tokenizer.")}
    unused = range(len(fields["tokenizer.ggml.tokens"].data), n_vocab)
    more = {
        "tokenizer.ggml.tokens": [f"[PAD{index}]" for index in unused],
        "tokenizer.ggml.token_type": [int(TokenType.UNUSED)] * len(unused),
        "tokenizer.ggml.scores": [0.0] * len(unused),
    }
    for key, field in fields.items():
        value = field.contents()
        if key in more:
            value += more[key]
        writer.add_key_value(key, value, *field.types)


def _add_made_up_vocabulary(writer: GGUFWriter, n_vocab: int) -> None:
    """A vocabulary of bytes and numbered words, which loads like any other."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    words = range(len(tokens), n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"t{index}" for index in words])
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * len(words)])
    writer.add_token_scores([0.0] * n_vocab)


def _data_type(dims: tuple[int, ...]) -> GGMLQuantizationType:
    """Matrices are stored in _WEIGHTS, vectors and short convolutions in f32."""
    whole_blocks = len(dims) == 2 and dims[1] % GGML_QUANT_SIZES[_WEIGHTS][0] == 0
    return _WEIGHTS if whole_blocks else GGMLQuantizationType.F32


def _tensor_bytes(dims: tuple[int, ...]) -> int:
    return bytes_of(_data_type(dims), prod(dims))
