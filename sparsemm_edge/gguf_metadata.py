"""A GGUF file's model shape, and the `sparsemm.*` keys with its head budgets."""

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType

from sparsemm_edge.budgets import POLICIES, VOTES, BudgetSpec
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import GGUFField, GGUFHeader, shown

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
_ARRAYS = {"head_budgets": _U32, "head_scores": _F32, "layers": _U32}
# what it means that a file lacks a key: it is of an earlier version, or all layers have head budgets
_OPTIONAL = {"vote": "snapkv", "residual": False, "layers": None}

# Text architectures of LLaVA- and Qwen-VL-like models whose attention the evicting cache of patches/ has:
# rotary positions, no MLA, no attention sinks. In most of them every layer has full attention (llama.cpp
# 0c1e57098 keeps them in its plain KV cache); _attention_layers says which layers have it in the others. What
# else can rule a file out is checked in check_supported.
_SLIDING_WINDOW = frozenset({"gemma3", "gemma4"})
_OTHER_LAYERS = _SLIDING_WINDOW | {"lfm2", "qwen35", "qwen35moe"}
_N_LAYER_MAX = 512  # LLAMA_MAX_LAYERS
SUPPORTED_ARCHITECTURES = frozenset(
    {
        "gemma3",  # Gemma 3: a layer with full attention after five with a sliding window
        "gemma4",  # Gemma 4: the same, and layers that share K and V
        "glm4",  # GLM-4.1V, GLM-OCR
        "glm4moe",  # GLM-4.5V, GLM-4.6V
        "granite",  # Granite Vision
        "hunyuan_vl",  # HunyuanOCR
        "internlm2",  # InternVL
        "lfm2",  # LFM2-VL: convolutions beside attention
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
        "qwen35",  # Qwen3.5, Qwen3.6: a layer with full attention after three recurrent ones
        "qwen35moe",
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
        n_layer, n_head, n_head_kv: layers; query and KV heads per layer, the same in every layer. Layers that
            hold no K and V of all positions (recurrent, with a sliding window, or with the K and V of another
            layer) do not count.
        n_embd_head_k, n_embd_head_v: numbers in one key and one value of one KV head.
        layers: the numbers of those layers in the model, ascending; None: all of the model's layers count.
    """

    arch: str
    name: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    layers: tuple[int, ...] | None = None

    @property
    def layer_numbers(self) -> Sequence[int]:
        """The number in the model of each layer that counts: [n_layer]."""
        return range(self.n_layer) if self.layers is None else self.layers

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
        layers: the model's layers that the tables are of, [n_layer]; None: all.
    """

    spec: BudgetSpec
    head_budgets: npt.NDArray[np.uint32]
    head_scores: npt.NDArray[np.float32]
    scores_source: str
    water_fill_length: int
    enabled: bool = True
    layers: tuple[int, ...] | None = None

    def fields(self) -> dict[str, GGUFField]:
        """The metadata as GGUF keys and values; arrays as layer-major lists."""
        values = {"version": VERSION, **vars(self.spec), **vars(self)}
        scalars = {key: GGUFField(kind, None, values[key]) for key, kind in _SCALARS.items()}
        arrays = {
            key: GGUFField(GGUFValueType.ARRAY, kind, np.ravel(values[key]).tolist())
            for key, kind in _ARRAYS.items()
            if values[key] is not None
        }
        return {PREFIX + key: field for key, field in (scalars | arrays).items()}


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

    layers: tuple[int, ...] | None = None

    def count(key: str, default: int | None = None) -> int:
        """A positive whole number, or a list of the same one for every layer that counts."""
        value = header.value(f"{arch}.{key}", default)
        if isinstance(value, np.ndarray) and layers is not None and value.size > layers[-1]:
            value = value[list(layers)]
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, np.ndarray):
            raise SparseMMError(f"{path}: {shown(arch)}.{key} differs between layers, which is not supported")
        if value is None:
            raise SparseMMError(f"{path}: the key {shown(arch)}.{key} is missing")
        return _positive(value, f"{path}: {shown(arch)}.{key}")

    # layers that predict further tokens come last, and llama.cpp does not run them
    n_next = header.value(f"{arch}.nextn_predict_layers", 0)
    n_layer = count("block_count") - (n_next if isinstance(n_next, int) else 0)
    if n_layer < 1:
        raise SparseMMError(f"{path}: {shown(arch)}.nextn_predict_layers leaves no layer of block_count")
    layers = _attention_layers(header, arch, n_layer)
    n_head = count("attention.head_count")
    n_head_kv = count("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise SparseMMError(f"{path}: {n_head} query heads cannot be divided among {n_head_kv} KV heads")
    n_embd_head = count("embedding_length") // n_head
    name = header.value("general.name")
    return ModelShape(
        arch=arch,
        name=name if isinstance(name, str) and name else path.stem,
        n_layer=n_layer if layers is None else len(layers),
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head_k=count("attention.key_length", n_embd_head),
        n_embd_head_v=count("attention.value_length", n_embd_head),
        layers=layers,
    )


def _positive(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SparseMMError(f"{where} is {reprlib.repr(value)}, expected a positive whole number")
    return value


def _attention_layers(header: GGUFHeader, arch: str, n_layer: int) -> tuple[int, ...] | None:
    """The layers that hold K and V of all positions, as llama.cpp's load_arch_hparams finds them; None: all.

    Raises:
        SparseMMError: no layer does, or a key does not say it of every layer.
    """

    def of_layers(key: str, default: Any) -> list[Any]:
        """A list with an entry of every layer, or the same value for all."""
        value = header.value(f"{arch}.{key}", default)
        if not isinstance(value, np.ndarray):
            return [value] * n_layer
        if value.size < n_layer:
            raise SparseMMError(
                f"{header.path}: {arch}.{key} has {value.size} entries, the model has {n_layer} layers"
            )
        return list(value[:n_layer])

    def every(key: str, default: int) -> list[bool]:
        """Of n layers, the last one."""
        n = _positive(header.value(f"{arch}.{key}", default), f"{header.path}: {arch}.{key}")
        return [(layer + 1) % n == 0 for layer in range(n_layer)]

    if arch not in _OTHER_LAYERS:
        return None
    if n_layer > _N_LAYER_MAX:
        raise SparseMMError(
            f"{header.path}: {arch}.block_count is {n_layer}, llama.cpp runs {_N_LAYER_MAX} at most"
        )
    if arch in ("qwen35", "qwen35moe"):
        key = "attention.recurrent_layers"
        if header.value(f"{arch}.{key}") is None:
            found = every("full_attention_interval", 4)
        else:
            found = [not recurrent for recurrent in of_layers(key, None)]
    elif arch == "lfm2":
        found = [bool(n) for n in of_layers("attention.head_count_kv", 1)]
    elif arch in _SLIDING_WINDOW and header.value(f"{arch}.attention.sliding_window", 0):
        key = "attention.sliding_window_pattern"
        if isinstance(header.value(f"{arch}.{key}"), np.ndarray):
            found = [not sliding for sliding in of_layers(key, None)]
        else:
            found = every(key, 6)
        shared = header.value(f"{arch}.attention.shared_kv_layers", 0)
        if arch == "gemma4" and isinstance(shared, int):
            found = [full and layer < n_layer - shared for layer, full in enumerate(found)]
    else:
        return None
    if not any(found):
        raise SparseMMError(f"{header.path}: this {arch} model has no layer with full attention")
    return tuple(layer for layer, full in enumerate(found) if full)


def check_supported(header: GGUFHeader, shape: ModelShape) -> None:
    """Raise SparseMMError, with the reason, unless the evicting cache can serve this file's model."""
    path, arch = header.path, shape.arch
    if arch not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(sorted(SUPPORTED_ARCHITECTURES))
        reason = f" ({REFUSED_ARCHITECTURES[arch]})" if arch in REFUSED_ARCHITECTURES else ""
        raise SparseMMError(
            f"{path}: unsupported architecture {reprlib.repr(arch)}{reason}; supported: {supported}"
        )
    # llama.cpp leaves the window of Phi-3 out of account
    for key, what, where in (
        ("attention.sliding_window", "a sliding window", _SLIDING_WINDOW | {"phi3"}),
        ("attention.kv_lora_rank", "latent attention (MLA)", frozenset[str]()),
    ):
        if arch not in where and np.any(header.value(f"{arch}.{key}", 0)):
            raise SparseMMError(f"{path}: unsupported model: it has {what} ({arch}.{key})")
    missing = list(islice(_missing_tensors(header, shape), 4))
    if missing:
        names = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
        with_attention = "" if shape.layers is None else " with full attention"
        raise SparseMMError(
            f"{path}: missing tensors: {names}"
            f" (a {arch} model of {shape.n_layer} layers{with_attention} has to have them)"
        )


def _missing_tensors(header: GGUFHeader, shape: ModelShape) -> Iterator[str]:
    """Names of attention weights that every supported architecture needs and the file lacks."""
    if "token_embd.weight" not in header.tensors:
        yield "token_embd.weight"
    for layer in shape.layer_numbers:
        fused = f"blk.{layer}.attn_qkv.weight" in header.tensors
        parts: tuple[str, ...] = ("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")
        if shape.arch == "gemma4" and not fused:  # whose layers can have the same K and V
            parts = ("attn_q", "attn_k")
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
        if field is None:
            if key not in _OPTIONAL:
                raise broken(f"{PREFIX}{key} is missing")
            values[key] = _OPTIONAL[key]
            continue
        expected = (GGUFValueType.ARRAY, kind) if key in _ARRAYS else (kind, None)
        if (field.type, field.item_type) != expected:
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
        n_entries = shape.n_layer * columns
        if values[key].size != n_entries:
            raise broken(f"{PREFIX}{key} has {values[key].size} entries, the model needs {n_entries}")
        values[key] = values[key].reshape(shape.n_layer, columns)

    if values["layers"] is not None:
        values["layers"] = tuple(values["layers"].tolist())
        if values["layers"] != tuple(shape.layer_numbers):
            raise broken(f"{PREFIX}layers does not name the layers with full attention")
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
