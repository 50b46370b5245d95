#!/usr/bin/env python3
"""Derive the demo model's GGUF files from its checkpoint: models/demo -> sparsemm_edge/demo_model.

    make_demo_gguf.py                    what `make setup` runs; nothing to do where the files are up to date
    make_demo_gguf.py HF_DIR OUTDIR      the same for another checkpoint

The packaged files are the GGUF files of the text model and the image encoder, and the head scores
(scores/demo.json). Both GGUF files are f16, written with gguf-py and numpy: neither torch nor transformers
is needed: tests/reference/test_demo_gguf.py compares the text model with what llama.cpp's converter makes.
The user cache keeps the files by the hash of what they are made from, so that a machine converts a checkpoint
once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.utility import SafetensorsLocal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHECKPOINT = ROOT / "models" / "demo"
PACKAGED = ROOT / "sparsemm_edge" / "demo_model"
SCORES = ROOT / "scores" / "demo.json"
FILES = ("model-f16.gguf", "mmproj-f16.gguf")

# what the files are made by, besides the checkpoint
_MAKERS = (
    ROOT / "sparsemm_edge" / "mmproj.py",
    Path(__file__).resolve(),
)

_TEXT = "language_model."
_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.v_proj": "attn_v",
}
_OTHER_TENSORS = {"lm_head": "output", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def make(checkpoint: Path, out: Path) -> None:
    """Put FILES into `out`, from the cache where it has them."""
    key = _hash(checkpoint)
    stamp = out / ".made-from"
    if stamp.is_file() and stamp.read_text() == key and all((out / name).is_file() for name in FILES):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = home / "sparsemm-edge" / "demo-model" / key
    if not cached.is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".making-") as work:
            made = Path(work) / "made"
            made.mkdir()
            _convert(checkpoint, made)
            try:
                made.rename(cached)
            except OSError:
                if not cached.is_dir():  # else another process was faster
                    raise
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        _replace(cached / name, out / name)
    stamp.write_text(key)


def _replace(source: Path, target: Path) -> None:
    """Copy beside the target and rename: a process that has the old file mapped keeps it."""
    from sparsemm_edge.files import atomic_path

    with atomic_path(target) as part:
        shutil.copyfile(source, part)


def _hash(checkpoint: Path) -> str:
    """Of the checkpoint's files and of what converts them."""
    if not (checkpoint / "config.json").is_file():
        raise SystemExit(f"error: {checkpoint} holds no checkpoint (config.json is missing)")
    digest = hashlib.sha256()
    for path in [*sorted(path for path in checkpoint.iterdir() if path.suffix != ".md"), *_MAKERS]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _convert(checkpoint: Path, out: Path) -> None:
    from sparsemm_edge.mmproj import convert_mmproj

    text, vision = (out / name for name in FILES)
    write_text_model(checkpoint, text)
    convert_mmproj(checkpoint, vision, outtype="f16")


def write_text_model(checkpoint: Path, out: Path) -> None:
    """Write the LLaMA text model of a LLaVA checkpoint as an f16 GGUF, as llama.cpp's converter would.

    Args:
        checkpoint: folder of config.json, tokenizer.json, tokenizer_config.json and f16 safetensors, as
            train_demo_model.py saves them.
        out: the file to write.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
    writer = gguf.GGUFWriter(out, "llama")
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in SafetensorsLocal(path).tensors.items():
            if name.startswith(_TEXT):
                if tensor.dtype != "F16":
                    raise SystemExit(f"error: {path}: {name} is {tensor.dtype}, expected F16")
                data = tensor.mmap_bytes().view(np.float16).reshape(tensor.shape)
                _add_tensor(writer, name.removeprefix(_TEXT), data, config)
    writer.add_type("model")
    writer.add_name(checkpoint.resolve().name.title())
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    _add_shape(writer, config)
    _add_tokenizer(writer, checkpoint)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: gguf.GGUFWriter, name: str, data: np.ndarray, config: dict[str, Any]) -> None:
    name = name.removesuffix(".weight")
    if name in _OTHER_TENSORS:
        target = _OTHER_TENSORS[name]
    else:
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        target = f"blk.{layer}.{_LAYER_TENSORS[part]}"
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            query = part == "self_attn.q_proj"
            data = _interleaved(data, config["num_attention_heads" if query else "num_key_value_heads"])
    writer.add_tensor(f"{target}.weight", data if data.ndim > 1 else data.astype(np.float32))


def _interleaved(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Rows in the order of ggml's RoPE, which rotates neighbours; transformers rotates halves of a head."""
    halves = weight.reshape(n_head, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path) -> None:
    """The tokens of demo_tokenizer.py, whose SentencePiece scores are minus the id of a character."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    pieces = {i: piece for piece, i in tokenizer["model"]["vocab"].items()}
    pieces |= {i: token["content"] for i, token in added.items()}
    tokens, scores, types = [], [], []
    for i in range(len(pieces)):
        if i in added:
            kind = gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED
            score = -1000.0
        elif pieces[i].startswith("<0x"):
            kind, score = gguf.TokenType.BYTE, 0.0
        else:
            kind, score = gguf.TokenType.NORMAL, -float(i)
        tokens.append(pieces[i])
        scores.append(score)
        types.append(kind)
    ids = {piece: i for i, piece in pieces.items()}
    writer.add_add_space_prefix(config["add_prefix_space"])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(ids[config["bos_token"]])
    writer.add_eos_token_id(ids[config["eos_token"]])
    writer.add_unk_token_id(ids[config["unk_token"]])
    writer.add_pad_token_id(ids[config["pad_token"]])
    writer.add_add_bos_token(config["add_bos_token"])
    writer.add_chat_template(config["chat_template"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT, metavar="HF_DIR")
    parser.add_argument("out", type=Path, nargs="?", default=PACKAGED, metavar="OUTDIR")
    arguments = parser.parse_args()
    make(arguments.checkpoint, arguments.out)
    if arguments.out == PACKAGED:
        if not SCORES.is_file():
            raise SystemExit(
                f"error: {SCORES} is missing: sparsemm-edge score models/demo --data grid makes it"
            )
        _replace(SCORES, PACKAGED / "head-scores.json")


if __name__ == "__main__":
    main()
