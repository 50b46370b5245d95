"""Tiny GGUF models for tests that never run one: real headers, random bytes for weights."""

from pathlib import Path

import gguf
import numpy as np

Tensor = tuple[np.ndarray, gguf.GGMLQuantizationType | None]


def attention_tensors(n_layer: int = 2) -> dict[str, Tensor]:
    """The tensors that every supported text model has, as far as `convert` looks, in f32."""
    parts = ("attn_q", "attn_k", "attn_v", "attn_output")
    names = ["token_embd.weight"] + [f"blk.{il}.{part}.weight" for il in range(n_layer) for part in parts]
    random = np.random.default_rng(0)
    return {name: (random.random((2, 8), dtype=np.float32), None) for name in names}


def write_model(
    path: Path,
    *,
    arch: str = "llama",
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int = 2,
    tensors: dict[str, Tensor] | None = None,
    keys: dict[str, tuple[object, gguf.GGUFValueType]] | None = None,
    alignment: int | None = None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """A GGUF of the given shape, head size 8; `keys` are added last and replace those of the same name."""
    u32 = gguf.GGUFValueType.UINT32
    writer = gguf.GGUFWriter(path, arch, endianess=endianess)
    if alignment:
        writer.add_custom_alignment(alignment)
    fields: dict[str, tuple[object, gguf.GGUFValueType]] = {
        "general.name": ("Tiny", gguf.GGUFValueType.STRING),
        f"{arch}.block_count": (n_layer, u32),
        f"{arch}.embedding_length": (8 * n_head, u32),
        f"{arch}.attention.head_count": (n_head, u32),
        f"{arch}.attention.head_count_kv": (n_head_kv, u32),
    }
    for key, (value, kind) in (fields | (keys or {})).items():
        writer.add_key_value(key, value, kind)
    for name, (data, kind) in (attention_tensors(n_layer) if tensors is None else tensors).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
