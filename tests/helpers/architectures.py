"""Tiny random models of the architectures that evict, as PyTorch runs them and as llama.cpp does.

The text model is the checkpoint of a class in transformers, converted. So is the image encoder where the
converter takes what transformers saves; else one of the same kind is written (tiny_mmproj).
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers import vision_models
from helpers.tiny_mmproj import write_mmproj
from helpers.vision_models import TEXT, Architecture
from make_test_models import _CONVERT, llama_cpp_source

# llama.cpp does not load a vocabulary of this kind without merges, and these checkpoints have none; nor have
# they one of sentencepiece, which some converters ask for
_VOCABULARY = """
import gguf
from conversion.internlm import InternLM2Model
from conversion.phi import Phi3MiniModel
TextModel._set_vocab_sentencepiece = TextModel._set_vocab_gpt2
InternLM2Model.set_vocab = Phi3MiniModel.set_vocab = TextModel._set_vocab_gpt2
add_token_list = gguf.GGUFWriter.add_token_list
def with_merges(self, tokens):
    add_token_list(self, tokens)
    self.add_array("tokenizer.ggml.merges", ["a b"])
gguf.GGUFWriter.add_token_list = with_merges
for job in jobs:
"""

MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class TextModel:
    """A text model of its own class, with an image encoder that is written, not converted.

    Attributes:
        model: class of transformers.
        config: model_type there.
        mmproj: one of tiny_mmproj.KINDS.
        settings: what the configuration has beside vision_models.TEXT.
        published: what config.json says instead in checkpoints of the architecture, whose class is not in
            transformers but computes the same.
    """

    model: str
    config: str
    mmproj: str
    settings: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)

    def make(self, folder: Path) -> Path:
        transformers = importlib.import_module("transformers")
        tokenizer = vision_models._tokenizer("<image>")
        config = transformers.AutoConfig.for_model(
            self.config,
            **(TEXT | {"vocab_size": len(tokenizer) + 8, "tie_word_embeddings": False} | self.settings),
        )
        model = getattr(transformers, self.model)(config)
        vision_models._randomise(model, 0, tokenizer)
        model.generation_config.eos_token_id = 1
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


_GRANITE = {"embedding_multiplier": 2.0, "attention_multiplier": 0.2}
_GRANITE |= {"residual_multiplier": 0.7, "logits_scaling": 3.0}
_PHI = {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "intermediate_size": 256}
TEXT_MODELS = {
    "granite": TextModel(
        "GraniteForCausalLM",
        "granite",
        "llava-next",
        {
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 3.0,
        },
    ),
    # the dense text model of HunyuanOCR, without its positions of rows and columns
    "hunyuan_vl": TextModel(
        "HunYuanDenseV1ForCausalLM",
        "hunyuan_v1_dense",
        "mlp",
        {"eod_token_id": 1},
        {"architectures": ["HunYuanVLForConditionalGeneration"]},
    ),
    "internlm2": TextModel(
        "LlamaForCausalLM", "llama", "internvl", {}, {"architectures": ["InternLM2ForCausalLM"]}
    ),
    "minicpm": TextModel(
        "GraniteForCausalLM",
        "granite",
        "mlp",
        {
            "embedding_multiplier": 2.0,
            "attention_multiplier": TEXT["head_dim"] ** -0.5,
            "residual_multiplier": 1.2 / TEXT["num_hidden_layers"] ** 0.5,
            "logits_scaling": TEXT["hidden_size"] / 32,
        },
        {
            "architectures": ["MiniCPMForCausalLM"],
            "scale_emb": 2.0,
            "scale_depth": 1.2,
            "dim_model_base": 32,
        },
    ),
    "llama-smolvlm": TextModel("LlamaForCausalLM", "llama", "idefics3"),
    "llama-pixtral": TextModel("MistralForCausalLM", "mistral", "pixtral", {"sliding_window": None}),
    "phi2": TextModel(
        "PhiForCausalLM",
        "phi",
        "mlp",
        {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "intermediate_size": 256},
    ),
    "phi3": TextModel("Phi3ForCausalLM", "phi3", "mlp", {"sliding_window": 4096}),  # wider than any prompt
    "qwen2-internvl": TextModel("Qwen2ForCausalLM", "qwen2", "internvl"),
    "qwen2moe": TextModel("Qwen2MoeForCausalLM", "qwen2_moe", "internvl", MOE),
    "qwen3-internvl": TextModel("Qwen3ForCausalLM", "qwen3", "internvl"),
    "qwen3moe-internvl": TextModel("Qwen3MoeForCausalLM", "qwen3_moe", "internvl", MOE),
}


def _config(name: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Callable[[Any], Any]:
    """A configuration of this model_type; ids of tokens are looked up in `more`."""

    def config(ids: dict[str, int]) -> Any:
        return importlib.import_module("transformers").AutoConfig.for_model(
            name,
            text_config={"vocab_size": ids["size"], **TEXT, **text},
            vision_config=vision,
            tie_word_embeddings=False,
            **{key: ids.get(value, value) for key, value in more.items()},
        )

    return config


_GLM_VISION = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64}
_GLM_VISION |= {"image_size": 112}
_GLM_IDS = {
    "image_token_id": "image",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
}
_GLM_ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "mrope_section": [2, 1, 1],
    "partial_rotary_factor": 0.5,
}
_GLM_PROCESSOR = (
    "glm4v.image_processing_pil_glm4v.Glm4vImageProcessorPil",
    {"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 80}},
    "<|image|>",
)
_QWEN_PROCESSOR = vision_models.ARCHITECTURES["qwen3-vl"]
WHOLE = {
    "glm4v": Architecture(
        "Glm4vForConditionalGeneration",
        _config("glm4v", {"rope_parameters": _GLM_ROPE}, _GLM_VISION, **_GLM_IDS),
        *_GLM_PROCESSOR,
    ),
    "glm-ocr": Architecture(
        "GlmOcrForConditionalGeneration",
        _config("glm_ocr", {"rope_parameters": _GLM_ROPE}, _GLM_VISION, **_GLM_IDS),
        *_GLM_PROCESSOR,
    ),
    "glm4v-moe": Architecture(
        "Glm4vMoeForConditionalGeneration",
        _config(
            "glm4v_moe",
            {
                "rope_parameters": _GLM_ROPE,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
            },
            _GLM_VISION,
            **_GLM_IDS,
        ),
        *_GLM_PROCESSOR,
    ),
    "mistral3": Architecture(
        "Mistral3ForConditionalGeneration",
        _config(
            "mistral3",
            {"model_type": "mistral", "sliding_window": None},
            {
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "head_dim": 16,
                "image_size": 112,
                "hidden_act": "silu",
            },
            image_token_index="image",
            spatial_merge_size=1,
        ),
        "pixtral.image_processing_pil_pixtral.PixtralImageProcessorPil",
        {"size": {"longest_edge": 112}, "patch_size": {"height": 14, "width": 14}},
        "[IMG]",
    ),
    "paddleocr": Architecture(
        "PaddleOCRVLForConditionalGeneration",
        _config(
            "paddleocr_vl",
            {"rope_parameters": vision_models.MROPE},
            {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 112,
            },
            image_token_id="image",
            vision_start_token_id="<|IMAGE_START|>",
            vision_end_token_id="<|IMAGE_END|>",
        ),
        "paddleocr_vl.image_processing_pil_paddleocr_vl.PaddleOCRVLImageProcessorPil",
        {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 80}},
        "<|IMAGE_PLACEHOLDER|>",
    ),
    "qwen3-vl-moe": Architecture(
        "Qwen3VLMoeForConditionalGeneration",
        _config(
            "qwen3_vl_moe",
            {**MOE, "rope_parameters": vision_models.MROPE},
            {
                "depth": 3,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "out_hidden_size": 64,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
            image_token_id="image",
            video_token_id="<|video_pad|>",
            vision_start_token_id="<|vision_start|>",
            vision_end_token_id="<|vision_end|>",
        ),
        _QWEN_PROCESSOR.processor,
        _QWEN_PROCESSOR.settings,
        _QWEN_PROCESSOR.image_token,
    ),
}
WRITTEN = {name: model.mmproj for name, model in TEXT_MODELS.items()}
WRITTEN |= {"mistral3": "pixtral", "paddleocr": "paddleocr"}
"""Models whose image encoder is written, and its kind in tiny_mmproj."""

MODELS: dict[str, Callable[[Path], Path]] = {
    **{name: model.make for name, model in TEXT_MODELS.items()},
    **{name: partial(vision_models.make, name) for name in ("qwen2.5-vl", "qwen3-vl")},
    **{name: partial(vision_models.make, architecture) for name, architecture in WHOLE.items()},
}


@dataclass(frozen=True)
class Made:
    """A checkpoint, and the GGUF files (f32) of its text model and image encoder."""

    hf: Path
    text: Path
    mmproj: Path


def _as_published(name: str, hf: Path, folder: Path) -> Path:
    """A checkpoint as its architecture is published, where transformers saves it in another way."""
    published = TEXT_MODELS[name].published if name in TEXT_MODELS else {}
    if not published and name != "qwen3-vl-moe":
        return hf
    shutil.copytree(hf, folder)
    config = json.loads((hf / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | published))
    tensors = load_file(hf / "model.safetensors")
    if name == "qwen3-vl-moe":  # experts are input by output
        for key in tensors:
            if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[key] = tensors[key].transpose(1, 2).contiguous()
    if name == "internlm2":
        tensors = _internlm2(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _internlm2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaMA's tensors by InternLM2's names, the queries of a group with their key and value in one."""
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    found = {}
    for key, tensor in tensors.items():
        if ".q_proj." in key:
            of_layer = [tensors[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            groups = [part.reshape(TEXT["num_key_value_heads"], -1, part.shape[1]) for part in of_layer]
            key = key.replace("self_attn.q_proj", "attention.wqkv")
            found[key] = torch.cat(groups, dim=1).reshape(-1, tensor.shape[1])
        elif not any(part in key for part in (".k_proj.", ".v_proj.")):
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            found[key] = tensor.clone()
    return found


@cache
def made(name: str) -> Made:
    """The model of this name, one of MODELS; one process converts them all, in seconds."""
    return _all()[name]


@cache
def _all() -> dict[str, Made]:
    all_made, jobs = {}, []
    for name, make in MODELS.items():
        folder = Path(mkdtemp(prefix=f"{name}-"))
        files = Made(make(folder / "hf"), folder / "model.gguf", folder / "mmproj.gguf")
        source = _as_published(name, files.hf, folder / "published")
        checkpoint = [str(source), "--outtype", "f32", "--outfile"]
        jobs.append([*checkpoint, str(files.text)])
        if name in WRITTEN:
            write_mmproj(files.mmproj, WRITTEN[name], TEXT["hidden_size"])
        else:
            jobs.append([*checkpoint, str(files.mmproj), "--mmproj"])
        all_made[name] = files
    code = _CONVERT.replace("for job in jobs:\n", _VOCABULARY.lstrip())
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama_cpp_source(None)), json.dumps(jobs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return all_made
