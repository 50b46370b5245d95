"""A GGUF file's model shape, and the `sparsemm.*` keys with its head budgets."""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType

from sparsemm_edge.budgets import POLICIES, VOTES, BudgetSpec
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import GGUFField, GGUFHeader, read_header, shown

PREFIX = "sparsemm."
VERSION = 1

_U32 = GGUFValueType.UINT32
_F32 = GGUFValueType.FLOAT32
_BOOL = GGUFValueType.BOOL
_STR = GGUFValueType.STRING

# key without the prefix: type of the value, or of the items of an array
_SCALARS = {
    "version": _U32,
    "enabled": _BOOL,
    "policy": _STR,
    "budget": _U32,
    "window": _U32,
    "pool_kernel": _U32,
    "floor_ratio": _F32,
    "water_fill_length": _U32,
    "seed": _U32,
    "scores_source": _STR,
    "vote": _STR,
    "residual": _BOOL,
}
# keys that files of earlier versions lack, and what such a file means
_ADDED = {"vote": "snapkv", "residual": False}
_ARRAYS = {"head_budgets": _U32, "head_scores": _F32}

# Text architectures of LLaVA- and Qwen-VL-like models that llama.cpp (0c1e57098) keeps in its plain unified
# KV cache: llama_model::create_memory builds a llama_kv_cache for them, their graphs use build_attn_inp_kv,
# and every layer is full attention with rotary positions (no sliding window, no MLA, no recurrent layer, no
# attention sinks). What else can rule a file out is checked in check_supported.
SUPPORTED_ARCHITECTURES = frozenset(
    {
        "glm4",  # GLM-4.1V, GLM-OCR
        "glm4moe",  # GLM-4.5V, GLM-4.6V
        "granite",  # Granite Vision
        "hunyuan_vl",  # HunyuanOCR
        "internlm2",  # InternVL
        "llama",  # LLaVA on LLaMA, Vicuna, Mistral; Pixtral; SmolVLM; MiniCPM-V 2.5
        "minicpm",  # MiniCPM-V 2
        "mistral3",  # Mistral Small 3
        "paddleocr",  # PaddleOCR-VL
        "phi2",  # Moondream 2
        "phi3",  # LLaVA on Phi-3, Phi-4
        "qwen2",  # LLaVA-OneVision, InternVL
        "qwen2moe",
        "qwen2vl",  # Qwen2-VL, Qwen2.5-VL
        "qwen3",  # InternVL
        "qwen3moe",
        "qwen3vl",
        "qwen3vlmoe",
    }
)
# Text architectures of other vision-language models, and why the evicting cache cannot serve them.
REFUSED_ARCHITECTURES = {
    "cogvlm": "image and text tokens have weights of their own, a prompt read layer by layer would mix them",
    "deepseek2": "latent attention (MLA) has one K and V for all heads",
    "deepseek2-ocr": "not tested: llama.cpp's own test of the architectures leaves it out",
    "gemma3n": "a sliding window, and layers that share K and V",
    "llama4": "attention in chunks",
    "mistral4": "latent attention (MLA) has one K and V for all heads",
    "step35": "a sliding window",
}


@dataclass(frozen=True)
class ModelShape:
    """The parts of a text model's shape that determine its KV cache.

    Attributes:
        arch: general.architecture.
        name: general.name, or the file's name.
        n_layer, n_head, n_head_kv: layers; query and KV heads per layer, the same in every layer.
        n_embd_head_k, n_embd_head_v: numbers in one key and one value of one KV head.
    """

    arch: str
    name: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int

    @property
    def kv_heads(self) -> tuple[int, int]:
        """n_layer and n_head_kv, the shape of a table of head budgets."""
        return self.n_layer, self.n_head_kv

    def kv_bytes(self, positions: int, bytes_per_number: int = 2) -> int:
        """Bytes of K and V of this many positions of one KV head of one layer (f16 by default)."""
        return positions * (self.n_embd_head_k + self.n_embd_head_v) * bytes_per_number


@dataclass(frozen=True)
class SparseMMMetadata:
    """The `sparsemm.*` keys of a converted GGUF file.

    Attributes:
        spec: how the table was made; a runtime may override parts of it.
        head_budgets: [n_layer, n_head_kv] u32, positions each KV head keeps, window included.
        head_scores: [n_layer, n_head] f32, sum 1, to make other tables from.
        scores_source: model, data set and sha256 of the scores file.
        water_fill_length: prompt length in positions that the table was water-filled for; 0: it was not.
        enabled: False keeps the full cache.
    """

    spec: BudgetSpec
    head_budgets: npt.NDArray[np.uint32]
    head_scores: npt.NDArray[np.float32]
    scores_source: str
    water_fill_length: int
    enabled: bool = True

    def fields(self) -> dict[str, GGUFField]:
        """The metadata as GGUF keys and values; arrays as layer-major lists."""
        values = {"version": VERSION, **vars(self.spec), **vars(self)}
        scalars = {key: GGUFField(kind, None, values[key]) for key, kind in _SCALARS.items()}
        arrays = {
            key: GGUFField(GGUFValueType.ARRAY, kind, values[key].ravel().tolist())
            for key, kind in _ARRAYS.items()
        }
        return {PREFIX + key: field for key, field in (scalars | arrays).items()}


def read_model_shape(path: Path) -> ModelShape:
    """The shape of the text model in a GGUF file.

    Raises:
        SparseMMError: as read_header and model_shape.
    """
    return model_shape(read_header(path))


def read_metadata(path: Path) -> SparseMMMetadata | None:
    """The `sparsemm.*` metadata of a GGUF file, None if it holds none.

    Raises:
        SparseMMError: as read_header and sparsemm_metadata.
    """
    return sparsemm_metadata(read_header(path))


def text_architecture(header: GGUFHeader) -> str:
    """The architecture of the text model that a header describes.

    Raises:
        SparseMMError: the file is no text model: an image encoder (mmproj), an adapter, or something else.
    """
    path, arch = header.path, header.value("general.architecture")
    if not isinstance(arch, str):
        raise SparseMMError(f"{path}: general.architecture is missing, so this is no model")
    if arch == "clip":
        raise SparseMMError(
            f"{path}: this is an image encoder (mmproj); head budgets belong to the text model it goes with"
        )
    if header.value("general.type") == "adapter":
        raise SparseMMError(f"{path}: this is an adapter (LoRA); head budgets belong to the model it changes")
    return arch


def model_shape(header: GGUFHeader) -> ModelShape:
    """The shape of the text model that a header describes.

    Raises:
        SparseMMError: the file is an image encoder (mmproj), lacks a key, or its layers differ in heads.
    """
    path, arch = header.path, text_architecture(header)

    def count(key: str, default: int | None = None) -> int:
        """A positive whole number, or a list of the same one for every layer."""
        value = header.value(f"{arch}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, np.ndarray):
            raise SparseMMError(f"{path}: {shown(arch)}.{key} differs between layers, which is not supported")
        if value is None:
            raise SparseMMError(f"{path}: the key {shown(arch)}.{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SparseMMError(
                f"{path}: {shown(arch)}.{key} is {reprlib.repr(value)}, expected a positive whole number"
            )
        return value

    n_head = count("attention.head_count")
    n_head_kv = count("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise SparseMMError(f"{path}: {n_head} query heads cannot be divided among {n_head_kv} KV heads")
    # layers that predict further tokens come last, and llama.cpp does not run them
    n_next = header.value(f"{arch}.nextn_predict_layers", 0)
    n_layer = count("block_count") - (n_next if isinstance(n_next, int) else 0)
    if n_layer < 1:
        raise SparseMMError(f"{path}: {shown(arch)}.nextn_predict_layers leaves no layer of block_count")
    n_embd_head = count("embedding_length") // n_head
    name = header.value("general.name")
    return ModelShape(
        arch=arch,
        name=name if isinstance(name, str) and name else path.stem,
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head_k=count("attention.key_length", n_embd_head),
        n_embd_head_v=count("attention.value_length", n_embd_head),
    )


def check_supported(header: GGUFHeader, shape: ModelShape) -> None:
    """Raise SparseMMError, with the reason, unless the evicting cache can serve this file's model."""
    path, arch = header.path, shape.arch
    if arch not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(sorted(SUPPORTED_ARCHITECTURES))
        reason = f" ({REFUSED_ARCHITECTURES[arch]})" if arch in REFUSED_ARCHITECTURES else ""
        raise SparseMMError(
            f"{path}: unsupported architecture {reprlib.repr(arch)}{reason}; supported: {supported}"
        )
    for key, what in (
        ("attention.sliding_window", "a sliding window"),
        ("attention.kv_lora_rank", "latent attention (MLA)"),
    ):
        if arch == "phi3" and key == "attention.sliding_window":
            continue  # which llama.cpp leaves out of account
        if np.any(header.value(f"{arch}.{key}", 0)):
            raise SparseMMError(f"{path}: unsupported model: it has {what} ({arch}.{key})")
    missing = list(islice(_missing_tensors(header, shape.n_layer), 4))
    if missing:
        names = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
        raise SparseMMError(
            f"{path}: missing tensors: {names} (a {arch} model of {shape.n_layer} layers has to have them)"
        )


def _missing_tensors(header: GGUFHeader, n_layer: int) -> Iterator[str]:
    """Names of attention weights that every supported architecture needs and the file lacks."""
    if "token_embd.weight" not in header.tensors:
        yield "token_embd.weight"
    for layer in range(n_layer):
        fused = f"blk.{layer}.attn_qkv.weight" in header.tensors
        parts = ("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")
        for part in (*parts, "attn_output"):
            if f"blk.{layer}.{part}.weight" not in header.tensors:
                yield f"blk.{layer}.{part}.weight"


def sparsemm_metadata(header: GGUFHeader) -> SparseMMMetadata | None:
    """The `sparsemm.*` metadata that a header holds, None if it holds none.

    Raises:
        SparseMMError: naming the key that is missing, of the wrong type or out of its range.
    """
    if not any(key.startswith(PREFIX) for key in header.fields):
        return None

    def broken(reason: str) -> SparseMMError:
        return SparseMMError(f"{header.path}: broken sparsemm metadata: {reason}; convert the model again")

    values: dict[str, Any] = {}
    for key, kind in (_SCALARS | _ARRAYS).items():
        field = header.fields.get(PREFIX + key)
        if field is None and key in _ADDED:
            values[key] = _ADDED[key]
            continue
        if field is None:
            raise broken(f"{PREFIX}{key} is missing")
        found = field.item_type if key in _ARRAYS else field.type
        if found != kind or (field.item_type is not None) != (key in _ARRAYS):
            array = "array of " if key in _ARRAYS else ""
            raise broken(f"{PREFIX}{key} is not of type {array}{kind.name.lower()}")
        values[key] = field.value
        if key == "version" and field.value != VERSION:
            raise SparseMMError(
                f"{header.path}: sparsemm metadata of version {field.value}; this program reads {VERSION}"
            )
    del values["version"]
    # f32 holds 0.7 as 0.69999999, whose floor of a head budget may be one less: back to the shortest decimal.
    values["floor_ratio"] = float(str(np.float32(values["floor_ratio"])))

    shape = model_shape(header)
    for key, columns in (("head_budgets", shape.n_head_kv), ("head_scores", shape.n_head)):
        expected = shape.n_layer * columns
        if values[key].size != expected:
            raise broken(f"{PREFIX}{key} has {values[key].size} entries, the model needs {expected}")
        values[key] = values[key].reshape(shape.n_layer, columns)

    of_spec = {each.name: values.pop(each.name) for each in fields(BudgetSpec) if each.name in values}
    spec = BudgetSpec(**of_spec, water_fill=values["water_fill_length"] > 0)
    metadata = SparseMMMetadata(spec, **values)
    scores = metadata.head_scores
    if spec.policy not in POLICIES:
        raise broken(f"{PREFIX}policy is {reprlib.repr(spec.policy)}")
    if not 1 <= spec.window < spec.budget:
        raise broken(f"{PREFIX}window is {spec.window} with a {PREFIX}budget of {spec.budget}")
    if spec.vote not in VOTES:
        raise broken(f"{PREFIX}vote is {reprlib.repr(spec.vote)}")
    if metadata.head_budgets.min() < spec.least:
        least = f"the window ({spec.window})" + (" and the residual slot" if spec.residual else "")
        raise broken(f"{PREFIX}head_budgets holds {metadata.head_budgets.min()}, below {least}")
    if not 0 <= spec.floor_ratio <= 1:
        raise broken(f"{PREFIX}floor_ratio is {spec.floor_ratio}")
    if not spec.pool_kernel % 2:
        raise broken(f"{PREFIX}pool_kernel is {spec.pool_kernel}, expected an odd number")
    if not np.isfinite(scores).all() or (scores < 0).any() or not scores.any():
        raise broken(f"{PREFIX}head_scores must be finite, not negative and not all zero")
    return metadata
