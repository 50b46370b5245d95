"""Tiny random models some of whose layers hold something else than K and V of all positions: a recurrent
state, or K and V of a sliding window. As PyTorch runs them and as llama.cpp does."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import make_test_models
from helpers import oracle
from helpers.architectures import _VOCABULARY
from helpers.tiny_mmproj import write_mmproj
from helpers.vision_models import ARCHITECTURES, MROPE, TEXT, _qwen, _randomise, _tokenizer, make

# Gemma 4 has a vocabulary of its own
_GEMMA4 = """import gguf
from conversion.gemma import Gemma4Model
Gemma4Model.set_vocab = TextModel._set_vocab_gpt2
"""
_CONVERT = make_test_models._CONVERT.replace("for job in jobs:\n", _VOCABULARY.lstrip())
_CONVERT = _CONVERT.replace("import gguf\n", _GEMMA4, 1)
_QWEN35 = {
    "num_hidden_layers": 7,  # full attention in every third, which is not the last
    "full_attention_interval": 3,
    "layer_types": [("linear_attention", "full_attention")[layer % 3 == 2] for layer in range(7)],
    "rope_parameters": MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# the image encoder of Qwen3-VL, which adds nothing behind the embeddings here
_QWEN35_VISION = replace(
    ARCHITECTURES["qwen3-vl"],
    config=_qwen(
        "qwen3_vl",
        depth=3,
        hidden_size=32,
        out_hidden_size=TEXT["hidden_size"],
        num_position_embeddings=64,
        deepstack_visual_indexes=[],
    ),
)
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@dataclass(frozen=True)
class Spec:
    """A class of transformers, its model_type, and what its configuration has beside vision_models.TEXT."""

    model: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()  # of llama.cpp's converter
    seed: int = 0
    peak: float = 4  # how many times larger the norm makes the queries


SPECS = {
    "qwen3.5": Spec("Qwen3_5ForCausalLM", "qwen3_5_text", _QWEN35, ("--no-mtp",), seed=1, peak=1),
    "qwen3.5-moe": Spec("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", _QWEN35 | _MOE, ("--no-mtp",), peak=1),
    "lfm2": Spec(
        "Lfm2ForCausalLM",
        "lfm2",
        {
            "num_hidden_layers": 6,
            "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    # full attention in layers 5 and 11, as llama.cpp knows Gemma 3
    "gemma3": Spec(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {"num_hidden_layers": 13, "sliding_window": 48, "query_pre_attn_scalar": 16},
    ),
    # heads of another size where the window slides, inputs of each layer, two layers with K and V of others
    "gemma4": Spec(
        "Gemma4ForCausalLM",
        "gemma4_text",
        {
            "num_hidden_layers": 8,
            "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(8)],
            "sliding_window": 48,
            "global_head_dim": 32,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "final_logit_softcapping": 1e6,  # none: llama.cpp has one where the file does not say it
        },
        peak=0.4,  # it does not divide by the root of the head size
    ),
}


@dataclass(frozen=True)
class Made:
    """A checkpoint, and the GGUF files (f32) of its text model and of an image encoder."""

    hf: Path
    text: Path
    mmproj: Path


@cache
def made(name: str) -> Made:
    """The model of this name, one of SPECS."""
    transformers = importlib.import_module("transformers")
    folder, spec = Path(mkdtemp()), SPECS[name]
    files = Made(folder / "hf", folder / "model.gguf", folder / "mmproj.gguf")
    tokenizer = _tokenizer("<image>")
    n_vocab = len(tokenizer) + 3  # as many as Gemma's converter counts
    settings = TEXT | {"vocab_size": n_vocab, "vocab_size_per_layer_input": n_vocab} | spec.settings
    model = getattr(transformers, spec.model)(transformers.AutoConfig.for_model(spec.config, **settings))
    _randomise(model, spec.seed, tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("q_norm.weight"):  # _randomise made it four times as large
                parameter.mul_(spec.peak / 4)
            if key.endswith("q_layernorm.weight"):
                parameter.mul_(spec.peak)
    model.save_pretrained(files.hf)
    tokenizer.save_pretrained(files.hf)
    jobs = [[str(files.hf), "--outtype", "f32", "--outfile", str(files.text), *spec.options]]
    if name.startswith("qwen3.5"):
        vision = make(_QWEN35_VISION, folder / "vision")
        jobs.append([str(vision), "--outtype", "f32", "--outfile", str(files.mmproj), "--mmproj"])
    else:
        write_mmproj(files.mmproj, "gemma3" if name == "gemma3" else "mlp", TEXT["hidden_size"])
    source = make_test_models.llama_cpp_source(None)
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(source), json.dumps(jobs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return files


class _Shared:
    """What a layer leaves out and adds that attends to the K and V of another one."""

    listening = False

    def __init__(self, source: oracle._Tap) -> None:
        self._source = source

    @property
    def keep(self) -> torch.Tensor | None:
        return self._source.keep

    @property
    def slots(self) -> list[oracle.Slot | None]:
        return self._source.slots


class MixedOracle(oracle.Oracle):
    """The original of a model, in float32, of which the layers with full attention evict."""

    def __init__(self, hf_dir: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.decoder = self.model.model
        config = self.decoder.config
        config._attn_implementation = oracle._ATTENTION
        self.n_head, self.n_head_kv = config.num_attention_heads, config.num_key_value_heads
        self.taps: list[oracle._Tap] = []
        self.is_qwen, self.is_mrope = False, "mrope_section" in (config.rope_parameters or {})
        for layer, kind in zip(self.decoder.layers, config.layer_types, strict=True):
            if not hasattr(layer, "self_attn"):
                continue
            tap: Any = oracle._Tap(self.n_head_kv)
            if kind == "full_attention":
                if getattr(layer.self_attn, "is_kv_shared_layer", False):
                    tap = _Shared(self.taps[-1])
                else:
                    self.taps.append(tap)
            layer.self_attn.oracle_tap = tap
        self.n_layer = len(self.taps)
