"""Tiny image encoders as GGUF files: random weights, real kinds, patches that do not see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_EMBD, N_FF, N_HEAD, N_LAYER = 32, 48, 2, 2
PATCH, SIZE = 14, 112  # pixels a side
PINPOINTS = [224, 112, 112, 224, 224, 224, 336, 112, 112, 336]  # width, height

KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {"projector.scale_factor": 2},
    "mlp": {},
    "llava-next": {"projector": "mlp", "image_grid_pinpoints": PINPOINTS},
    "pixtral": {},
    "internvl": {"projector.scale_factor": 2, "preproc_max_tiles": 6},
    "paddleocr": {"image_min_pixels": 28 * 28 * 4, "image_max_pixels": 28 * 28 * 80},
    "idefics3": {"projector.scale_factor": 2, "preproc_image_size": 336},
}


def write_mmproj(path: Path, kind: str, n_embd_text: int, **changes: Any) -> Path:
    """One of KINDS for a text model this wide; `changes`: keys below `clip.vision.`, or `projector`."""
    settings = KINDS[kind] | changes
    projector = settings.pop("projector", kind)
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    side = SIZE // PATCH
    tensors = {"v.patch_embd.weight": weights(N_EMBD, 3, PATCH, PATCH) * 0.2}
    if projector != "pixtral":  # which rotates instead
        tensors["v.position_embd.weight"] = weights(side**2 + (projector == "internvl"), N_EMBD)
    for layer in range(N_LAYER):
        block = f"v.blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            tensors[f"{block}.{name}.weight"] = weights(N_EMBD, N_EMBD)
        tensors[f"{block}.attn_out.weight"][:] = 0  # nothing comes from other patches
        for name in ("ln1", "ln2"):
            tensors[f"{block}.{name}.weight"] = np.ones(N_EMBD, np.float32)
        tensors[f"{block}.ffn_up.weight"] = weights(N_FF, N_EMBD)
        tensors[f"{block}.ffn_down.weight"] = weights(N_EMBD, N_FF)
        if projector == "pixtral":
            tensors[f"{block}.ffn_gate.weight"] = weights(N_FF, N_EMBD)
    merged = N_EMBD * settings.get("projector.scale_factor", 1) ** 2
    if projector == "mlp":
        tensors |= _linear("mm.0", weights(n_embd_text, N_EMBD))
        tensors |= _linear("mm.2", weights(n_embd_text, n_embd_text))
    elif projector == "pixtral":
        tensors["mm.1.weight"] = weights(n_embd_text, N_EMBD)
        tensors["mm.2.weight"] = weights(n_embd_text, n_embd_text)
        tensors["v.token_embd.img_break"] = weights(n_embd_text)
        tensors["v.pre_ln.weight"] = np.ones(N_EMBD, np.float32)
    elif projector == "paddleocr":  # which merges 2 x 2 patches, whatever the file says
        tensors |= _linear("mm.input_norm", np.ones(N_EMBD, np.float32))
        tensors |= _linear("mm.1", weights(n_embd_text, 4 * N_EMBD))
        tensors |= _linear("mm.2", weights(n_embd_text, n_embd_text))
    elif projector == "internvl":
        tensors["v.class_embd"] = weights(N_EMBD)
        tensors |= _linear("mm.model.mlp.0", np.ones(merged, np.float32))
        tensors |= _linear("mm.model.mlp.1", weights(n_embd_text, merged))
        tensors |= _linear("mm.model.mlp.3", weights(n_embd_text, n_embd_text))
    elif projector == "gemma3":
        tensors["mm.soft_emb_norm.weight"] = np.full(N_EMBD, 8, np.float32)  # as large as embeddings of text
        tensors["mm.input_projection.weight"] = weights(n_embd_text, N_EMBD).T.copy()
    else:
        tensors["mm.model.fc.weight"] = weights(n_embd_text, merged)

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", projector)
    writer.add_bool("clip.use_gelu", True)
    numbers = {
        "image_size": SIZE,
        "patch_size": PATCH,
        "embedding_length": N_EMBD,
        "feed_forward_length": N_FF,
        "block_count": N_LAYER,
        "projection_dim": n_embd_text,
        "attention.head_count": N_HEAD,
    }
    for key, value in (numbers | settings).items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.25] * 3)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _linear(name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{name}.weight": weight, f"{name}.bias": np.zeros(len(weight), np.float32)}
