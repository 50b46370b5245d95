#!/usr/bin/env python3
"""Make the tiny random vision-language models that the tests run on, in seconds and without a download.

    make_test_models.py OUTDIR [NAME...]        make all (or the named) models that OUTDIR lacks

Per model: OUTDIR/NAME/hf is a Hugging Face checkpoint (processor, tokenizer and chat template included),
beside it lie model-f16.gguf, model-f32.gguf, mmproj-f16.gguf and mmproj-f32.gguf. The text models are
converted by the converter inside the pinned llama.cpp source, LLaVA's vision towers by this package.

The weights are random but not arbitrary. With common initialisations attention is nearly uniform and the
next token hangs on rounding; tests of an eviction that follows attention would then compare noise. Here
queries and keys are scaled per head so that softmax is peaky and heads differ, image features are as large
as token embeddings and differ from patch to patch, and every weight is exactly representable in f16, so
that the f16 and f32 files hold the same model as the checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sparsemm_edge.mmproj import convert_mmproj  # noqa: E402

OUTTYPES = ("f16", "f32")

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PRINTABLE = [chr(c) for c in range(0x20, 0x7F)] + ["\n", "é", "ß", "→"]


@dataclass(frozen=True)
class LlavaSpec:
    """A LLaVA-1.5-like model: CLIP or SigLIP tower, MLP projector, LLaMA."""

    seed: int
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    image_size: int
    tower: str = "clip_vision_model"
    tower_layers: int = 4
    feature_layer: int | tuple[int, ...] = -2


@dataclass(frozen=True)
class Qwen2VLSpec:
    """A Qwen2-VL-like model: M-RoPE, GQA, biases on queries, keys and values."""

    seed: int
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    image_size: int  # what the tests use; a multiple of 28, so that nothing resizes it


SPECS: dict[str, LlavaSpec | Qwen2VLSpec] = {
    # MHA, as LLaVA-1.5-7B
    "llava": LlavaSpec(seed=1, n_layer=5, n_embd=128, n_head=4, n_head_kv=4, head_dim=32, image_size=112),
    # 4 query heads per KV head
    "llava-gqa": LlavaSpec(seed=2, n_layer=6, n_embd=192, n_head=8, n_head_kv=2, head_dim=64, image_size=168),
    # 8 query heads on the one KV head, a tower without class token, two of its layers read
    "llava-siglip": LlavaSpec(
        seed=3,
        n_layer=4,
        n_embd=256,
        n_head=8,
        n_head_kv=1,
        head_dim=32,
        image_size=112,
        tower="siglip_vision_model",
        feature_layer=(1, 3),
    ),
    "qwen2vl": Qwen2VLSpec(seed=4, n_layer=4, n_embd=512, n_head=4, n_head_kv=2, image_size=224),
}


def sample_image(size: int | tuple[int, int], seed: int = 0) -> Image.Image:
    """A reproducible picture of `size` pixels (a side, or width and height): colours, shapes and letters."""
    width, height = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(width // 16, width // 3), rng.integers(height // 16, height // 3)
        shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
        shape([x, y, x + w, y + h], fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    for _ in range(4):
        letters = "".join(chr(c) for c in rng.integers(65, 91, 5))
        at = (int(rng.integers(0, width * 2 // 3)), int(rng.integers(0, height * 9 // 10)))
        draw.text(at, letters, fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return image


# --- weights ------------------------------------------------------------------------------------------


class _Init:
    """Fills a model's parameters, each from a seed of its own name: adding one changes no other."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.parameters = dict(model.named_parameters())
        self.seed = seed

    def normal(self, name: str, std: float, mean: float = 0.0) -> None:
        parameter = self.parameters.pop(name)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + _hash(name))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    def linear(self, name: str, gain: float, bias: float = 0.1) -> None:
        """A layer whose outputs have standard deviation `gain` for inputs of standard deviation 1."""
        weight = self.parameters[f"{name}.weight"]
        self.normal(f"{name}.weight", gain / (weight[0].numel() ** 0.5))
        if f"{name}.bias" in self.parameters:
            self.normal(f"{name}.bias", bias * gain)

    def norm(self, name: str) -> None:
        self.normal(f"{name}.weight", 0.1, 1.0)
        if f"{name}.bias" in self.parameters:
            self.normal(f"{name}.bias", 0.05)

    def finish(self) -> None:
        """Check that nothing kept its default, and round all to what f16 holds."""
        if self.parameters:
            raise RuntimeError(f"parameters without initialisation: {sorted(self.parameters)}")


def _hash(name: str) -> int:
    value = 0
    for char in name.encode():
        value = (value * 131 + char) % 998_244_353
    return value


def _scale_heads(weight: torch.Tensor, scales: torch.Tensor) -> None:
    """Multiply the rows of each head of a projection [n_head * head_dim, n_embd] by the head's scale."""
    with torch.no_grad():
        weight.view(len(scales), -1, weight.shape[1]).mul_(scales[:, None, None])


def _init_text(init: _Init, model: nn.Module, prefix: str, lm_head: str, spec: Any, vocab: list[str]) -> None:
    """A decoder with peaky attention whose answers hang on what it attends to and not on rounding."""
    parameters = dict(model.named_parameters())
    init.normal(f"{prefix}embed_tokens.weight", 1.0)
    generator = torch.Generator().manual_seed(spec.seed)
    for il in range(spec.n_layer):
        layer = f"{prefix}layers.{il}."
        init.norm(f"{layer}input_layernorm")
        init.norm(f"{layer}post_attention_layernorm")
        init.linear(f"{layer}self_attn.q_proj", 1.0)
        init.linear(f"{layer}self_attn.k_proj", 1.0)
        # q . k / sqrt(d) has this standard deviation: softmax has a few winners among hundreds
        peakiness = 2.0 + 1.5 * torch.rand(spec.n_head, generator=generator)
        _scale_heads(parameters[f"{layer}self_attn.q_proj.weight"], peakiness)
        init.linear(f"{layer}self_attn.v_proj", 1.0)
        # Small against the embeddings, or each layer amplifies the rounding of those before (flash attention
        # adds in f16); large enough that a full and an evicted cache soon say different things.
        init.linear(f"{layer}self_attn.o_proj", 0.4)
        init.linear(f"{layer}mlp.gate_proj", 1.0)
        init.linear(f"{layer}mlp.up_proj", 1.0)
        init.linear(f"{layer}mlp.down_proj", 0.6)
    init.norm(f"{prefix}norm")
    init.linear(lm_head, 6.0)
    # only printable characters are ever said: an answer is never cut short
    with torch.no_grad():
        said = torch.tensor([len(t) == 1 and t.isascii() and t.isprintable() for t in vocab])
        parameters[f"{lm_head}.weight"].mul_(said[:, None])


def _init_vision_layers(init: _Init, prefix: str, n_layer: int) -> None:
    for il in range(n_layer):
        layer = f"{prefix}encoder.layers.{il}."
        init.norm(f"{layer}layer_norm1")
        init.norm(f"{layer}layer_norm2")
        init.linear(f"{layer}self_attn.q_proj", 1.5)
        init.linear(f"{layer}self_attn.k_proj", 1.5)
        init.linear(f"{layer}self_attn.v_proj", 1.0)
        init.linear(f"{layer}self_attn.out_proj", 1.0)
        init.linear(f"{layer}mlp.fc1", 1.0)
        init.linear(f"{layer}mlp.fc2", 1.5)


def _round_to_f16(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())


def _balance(weight: nn.Parameter, bias: nn.Parameter, features: torch.Tensor) -> None:
    """Scale a projector's last layer so that its outputs look like token embeddings: mean 0, deviation 1."""
    with torch.no_grad():
        mean, scale = features.mean(0), 1.0 / features.std(0).mean()
        weight.mul_(scale)
        bias.copy_((bias - mean) * scale)


# --- LLaVA --------------------------------------------------------------------------------------------


def _write_sentencepiece(path: Path) -> list[str]:
    """A character-level SentencePiece model (bytes as fallback, no merges, no dummy prefix); its pieces."""
    spm: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = spm.ModelProto()
    piece_type = spm.ModelProto.SentencePiece
    pieces = [("<unk>", piece_type.UNKNOWN), ("<s>", piece_type.CONTROL), ("</s>", piece_type.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", piece_type.BYTE) for byte in range(256)]
    pieces += [("▁" if char == " " else char, piece_type.NORMAL) for char in PRINTABLE]
    for i, (text, kind) in enumerate(pieces):
        piece = model.pieces.add()
        piece.piece, piece.type = text, kind
        piece.score = -float(i) if kind == piece_type.NORMAL else 0.0
    model.trainer_spec.model_type = spm.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    path.write_bytes(model.SerializeToString())
    return [text for text, _ in pieces]


def _llava_tokenizer(hf_dir: Path) -> tuple[PreTrainedTokenizerFast, list[str]]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = _write_sentencepiece(hf_dir / "tokenizer.model")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in pieces[:3]])
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<image>", "<pad>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = LLAVA_TEMPLATE
    return fast, [*pieces, "<image>", "<pad>"]


def _patch_tokenizer_config(hf_dir: Path, **changes: Any) -> None:
    """State what transformers 5 no longer writes but llama.cpp's converter reads."""
    path = hf_dir / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(changes)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_llava(hf_dir: Path, spec: LlavaSpec) -> None:
    """Write a random LLaVA checkpoint to `hf_dir`."""
    from transformers import (
        AutoConfig,
        CLIPImageProcessorPil,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer, vocab = _llava_tokenizer(hf_dir)
    is_clip = spec.tower == "clip_vision_model"
    n_patches = (spec.image_size // 14) ** 2
    feature_layer = list(spec.feature_layer) if isinstance(spec.feature_layer, tuple) else spec.feature_layer
    config = LlavaConfig(
        vision_config=AutoConfig.for_model(
            spec.tower,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=spec.tower_layers,
            num_attention_heads=4,
            image_size=spec.image_size,
            patch_size=14,
            **({} if is_clip else {"vision_use_head": False}),
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=spec.n_embd,
            intermediate_size=2 * spec.n_embd,
            num_hidden_layers=spec.n_layer,
            num_attention_heads=spec.n_head,
            num_key_value_heads=spec.n_head_kv,
            head_dim=spec.head_dim,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=len(vocab) - 1,
            architectures=["LlamaForCausalLM"],
        ),
        image_token_index=len(vocab) - 2,
        image_seq_length=n_patches,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if is_clip else "full",
    )
    model = LlavaForConditionalGeneration(config).eval()

    init = _Init(model, spec.seed)
    tower = "model.vision_tower."
    init.linear(f"{tower}embeddings.patch_embedding", 1.0)
    init.normal(f"{tower}embeddings.position_embedding.weight", 0.5)
    if is_clip:
        init.normal(f"{tower}embeddings.class_embedding", 1.0)
        init.norm(f"{tower}pre_layrnorm")
    init.norm(f"{tower}post_layernorm")
    _init_vision_layers(init, tower, spec.tower_layers)
    projector = "model.multi_modal_projector."
    init.linear(f"{projector}linear_1", 1.5)
    init.linear(f"{projector}linear_2", 1.0)
    _init_text(init, model, "model.language_model.", "lm_head", spec, vocab)
    init.finish()

    size = {"height": spec.image_size, "width": spec.image_size}
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": spec.image_size}, crop_size=size, **({} if is_clip else _SIGLIP_COLOURS)
    )
    pixels = torch.cat(
        [
            torch.tensor(np.asarray(image_processor(sample_image(spec.image_size, s))["pixel_values"]))
            for s in range(4)
        ]
    )
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(pixels).pooler_output))
    linear_2 = model.model.multi_modal_projector.linear_2
    _balance(linear_2.weight, linear_2.bias, features)
    _round_to_f16(model)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(hf_dir)
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if is_clip else 0,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(hf_dir)
    special = {str(i): vocab[i] for i in (0, 1, 2, len(vocab) - 2, len(vocab) - 1)}
    _patch_tokenizer_config(
        hf_dir,
        add_bos_token=True,
        add_prefix_space=False,
        added_tokens_decoder={i: _added_token(token) for i, token in special.items()},
        chat_template=LLAVA_TEMPLATE,
    )


_SIGLIP_COLOURS: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _added_token(content: str) -> dict[str, Any]:
    return {
        "content": content,
        "special": True,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
    }


# --- Qwen2-VL -----------------------------------------------------------------------------------------

# The pre-tokenizer of Qwen2, as its own tokenizer.json states it and as llama.cpp implements "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN_MERGES = ["t h", "i n", "e r", "th e", "Ġ t", "Ġ a", "in g", "Ġ the", "o n"]
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def _qwen_tokenizer() -> tuple[PreTrainedTokenizerFast, list[str]]:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [(left, right) for left, right in map(str.split, QWEN_MERGES)]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += dict.fromkeys("".join(merge) for merge in merges)
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in QWEN_SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = QWEN_TEMPLATE
    return fast, [*pieces, *QWEN_SPECIAL]


def make_qwen2vl(hf_dir: Path, spec: Qwen2VLSpec) -> None:
    """Write a random Qwen2-VL checkpoint to `hf_dir`."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer, vocab = _qwen_tokenizer()
    ids = {token: len(vocab) - len(QWEN_SPECIAL) + i for i, token in enumerate(QWEN_SPECIAL)}
    head_dim = spec.n_embd // spec.n_head
    depth = 3
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(vocab),
            "hidden_size": spec.n_embd,
            "intermediate_size": spec.n_embd,
            "num_hidden_layers": spec.n_layer,
            "num_attention_heads": spec.n_head,
            "num_key_value_heads": spec.n_head_kv,
            "max_position_embeddings": 4096,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            # Qwen2-VL's own sections: time, height and width, in pairs of a head's dimensions
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
            },
        },
        vision_config={"depth": depth, "embed_dim": 64, "num_heads": 4, "hidden_size": spec.n_embd},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen2VLForConditionalGeneration(config).eval()

    init = _Init(model, spec.seed)
    visual = "model.visual."
    init.linear(f"{visual}patch_embed.proj", 1.0)
    for il in range(depth):
        block = f"{visual}blocks.{il}."
        init.norm(f"{block}norm1")
        init.norm(f"{block}norm2")
        init.linear(f"{block}attn.qkv", 1.3)
        init.linear(f"{block}attn.proj", 1.0)
        init.linear(f"{block}mlp.fc1", 1.0)
        init.linear(f"{block}mlp.fc2", 1.5)
    init.norm(f"{visual}merger.ln_q")
    init.linear(f"{visual}merger.mlp.0", 1.5)
    init.linear(f"{visual}merger.mlp.2", 1.0)
    _init_text(init, model, "model.language_model.", "lm_head", spec, vocab)
    init.finish()

    image_processor = Qwen2VLImageProcessorPil()
    batch = image_processor([sample_image(spec.image_size, s) for s in range(4)])
    with torch.no_grad():
        features = model.get_image_features(
            torch.tensor(np.asarray(batch["pixel_values"])), torch.tensor(np.asarray(batch["image_grid_thw"]))
        ).pooler_output
    last = model.model.visual.merger.mlp[2]
    _balance(last.weight, last.bias, torch.cat(list(features)))
    _round_to_f16(model)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.save_pretrained(hf_dir)
    tokenizer.save_pretrained(hf_dir)
    image_processor.save_pretrained(hf_dir)
    _patch_tokenizer_config(
        hf_dir,
        tokenizer_class="Qwen2Tokenizer",
        add_bos_token=False,
        added_tokens_decoder={str(i): _added_token(token) for token, i in ids.items()},
        chat_template=QWEN_TEMPLATE,
    )


# --- conversion ---------------------------------------------------------------------------------------

# Runs in one process of its own, since the converter wants the gguf-py of its own source: argv[1] is that
# source, argv[2] the converter's arguments for each file. The converter knows a BPE pre-tokenizer by the hash
# of a long text's tokens, which a tiny vocabulary cannot have, so it is told.
_CONVERT = """
import json, logging, sys
source, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [source, source + "/gguf-py"]
logging.basicConfig(level=logging.WARNING)
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
for job in jobs:
    sys.argv = ["convert_hf_to_gguf.py", *job]
    convert_hf_to_gguf.main()
"""


def llama_cpp_source(given: Path | None) -> Path:
    """The llama.cpp tree with the converter: as given, by SPARSEMM_LLAMA_CPP_SOURCE, or the pinned source."""
    if given is None and (stated := os.environ.get("SPARSEMM_LLAMA_CPP_SOURCE")):
        given = Path(stated)
    if given is None:
        script = ROOT / "scripts" / "build_llama_cpp_python.py"
        printed = subprocess.run(
            [sys.executable, script, "source"], check=True, stdout=subprocess.PIPE, text=True
        )
        given = Path(printed.stdout.strip())
    for folder in (given, given / "vendor" / "llama.cpp"):
        if (folder / "convert_hf_to_gguf.py").is_file():
            return folder
    raise SystemExit(f"error: {given} holds no convert_hf_to_gguf.py")


def convert(folders: list[Path], source: Path) -> None:
    """Convert the checkpoints in `folders`, FOLDER/hf each, to the GGUF files beside it."""
    jobs = []
    for folder in folders:
        for outtype in OUTTYPES:
            jobs.append([f"{folder}/hf", "--outtype", outtype, "--outfile", f"{folder}/model-{outtype}.gguf"])
            if (folder / "hf" / "tokenizer.model").exists():  # LLaVA
                convert_mmproj(folder / "hf", folder / f"mmproj-{outtype}.gguf", outtype=outtype)
            else:
                outfile = f"{folder}/mmproj-{outtype}.gguf"
                jobs.append([f"{folder}/hf", "--mmproj", "--outtype", outtype, "--outfile", outfile])
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(source), json.dumps(jobs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"error: llama.cpp's converter failed:\n{done.stdout}")


def make(out: Path, names: list[str], source: Path) -> None:
    """Make the models that `out` lacks; a model appears in `out` whole or not at all."""
    wanted = [name for name in names if not (out / name).is_dir()]
    if not wanted:
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as work:
        for name in wanted:
            hf_dir = Path(work) / name / "hf"
            hf_dir.mkdir(parents=True)
            spec = SPECS[name]
            if isinstance(spec, LlavaSpec):
                make_llava(hf_dir, spec)
            else:
                make_qwen2vl(hf_dir, spec)
        convert([Path(work) / name for name in wanted], source)
        for name in wanted:
            with contextlib.suppress(OSError):  # another process was faster
                (Path(work) / name).rename(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(SPECS)}")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="llama.cpp source with the converter")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(SPECS)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(SPECS)}")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    make(arguments.out, arguments.names or list(SPECS), llama_cpp_source(arguments.llama_cpp))


if __name__ == "__main__":
    main()
