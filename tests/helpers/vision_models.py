"""Tiny random checkpoints of every architecture that can be scored, each with its own image processor.

Attention is peaky and answers are printable characters, as in scripts/make_test_models.py. These need no
GGUF, so each is made where it is used, in a fraction of a second.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from helpers.models import sample_image
from sparsemm_edge.pages import Chunk, Page

MARKS = ["<s>", "</s>", "<pad>"]
IMAGE_TOKENS = {"qwen": "<|image_pad|>", "internvl": "<IMG_CONTEXT>"}
OTHERS = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<img>", "</img>", "<global-img>", "\n\n"]
OTHERS += [
    "<fake_token_around_image>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)),
]
# looked up by name in llama.cpp: [IMG_*] of Pixtral, <|IMAGE_*|> of PaddleOCR-VL, the rest of GLM-4V
OTHERS += ["[IMG_BREAK]", "[IMG_END]", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|endoftext|>", "<|user|>"]
OTHERS += ["<|begin_of_image|>", "<|end_of_image|>", "[gMASK]", "<|observation|>"]

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
PINPOINTS = [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]]


def _tokenizer(image_token: str) -> Any:
    """A character a token; bytes for what is not ASCII."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*MARKS, *letters]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*MARKS, image_token, *OTHERS]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    image = f"<|vision_start|>{image_token}<|vision_end|>" if "pad" in image_token else f"{image_token}\n"
    fast.chat_template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + image.replace("\n", "\\n") + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
    )
    return fast


def _randomise(model: nn.Module, seed: int, tokenizer: Any) -> None:
    """Peaky attention in the text model, and answers that hang on what it attends to."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2 and "newline" not in name:
                parameter.copy_((1 if name.endswith("weight") else 0) + 0.1 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.copy_(noise / fan_in**0.5)
            if name.endswith("q_proj.weight"):
                parameter.mul_(4)
            if "embed_tokens" in name:
                parameter.copy_(noise)
            if name.endswith("q_norm.weight"):  # which undoes what is done to q_proj
                parameter.mul_(4)
            if name == "lm_head.weight":
                said = [tokenizer.convert_tokens_to_ids(chr(code)) for code in range(33, 127)]
                mask = torch.zeros(len(parameter), 1)
                mask[said] = 8
                parameter.mul_(mask)


@dataclass(frozen=True)
class Architecture:
    """`config(text)` and the processor's class and settings make a checkpoint."""

    model: str
    config: Callable[[Any], Any]
    processor: str
    settings: dict[str, Any]
    image_token: str = "<image>"
    image_key: str = "image_token_index"


def _llava(name: str, vision: dict[str, Any], text_type: str = "llama", **more: Any) -> Callable[[Any], Any]:
    def config(ids: dict[str, int]) -> Any:
        from transformers import AutoConfig

        text = AutoConfig.for_model(text_type, vocab_size=ids["size"], **TEXT, **more.pop("text", {}))
        tower = AutoConfig.for_model(**vision)
        return AutoConfig.for_model(
            name,
            vision_config=tower,
            text_config=text,
            image_token_index=ids["image"],
            vision_feature_layer=-2,
            vision_feature_select_strategy="default" if vision is CLIP else "full",
            tie_word_embeddings=False,
            **more,
        )

    return config


def _qwen(name: str, **vision: Any) -> Callable[[Any], Any]:
    def config(ids: dict[str, int]) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(
            name,
            text_config={"vocab_size": ids["size"], **TEXT, "rope_parameters": MROPE},
            vision_config={"depth": 2, "num_heads": 2, "intermediate_size": 48, **vision},
            image_token_id=ids["image"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )

    return config


def _internvl(ids: dict[str, int]) -> Any:
    from transformers import AutoConfig

    vision = {key: CLIP[key] for key in CLIP if key != "model_type"} | {"num_hidden_layers": 2}
    return AutoConfig.for_model(
        "internvl",
        vision_config=vision,
        text_config={"model_type": "qwen2", "vocab_size": ids["size"], **TEXT},
        image_token_id=ids["image"],
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _idefics3(name: str) -> Callable[[Any], Any]:
    def config(ids: dict[str, int]) -> Any:
        from transformers import AutoConfig

        vision = {key: CLIP[key] for key in CLIP if key != "model_type"} | {"num_hidden_layers": 2}
        return AutoConfig.for_model(
            name,
            vision_config=vision,
            text_config={"model_type": "llama", "vocab_size": ids["size"], **TEXT},
            image_token_id=ids["image"],
            scale_factor=2,
            tie_word_embeddings=False,
        )

    return config


SQUARE = {"height": 112, "width": 112}
QWEN_PIXELS = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 80}
ARCHITECTURES = {
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        _llava("llava", CLIP),
        "clip.image_processing_pil_clip.CLIPImageProcessorPil",
        {"size": {"shortest_edge": 112}, "crop_size": SQUARE},
    ),
    "llava-padded": Architecture(
        "LlavaForConditionalGeneration",
        _llava("llava", CLIP),
        "llava.image_processing_pil_llava.LlavaImageProcessorPil",
        {"size": {"shortest_edge": 112}, "crop_size": SQUARE, "do_pad": True},
    ),
    "llava-siglip": Architecture(
        "LlavaForConditionalGeneration",
        _llava("llava", SIGLIP),
        "siglip.image_processing_pil_siglip.SiglipImageProcessorPil",
        {"size": SQUARE},
    ),
    "llava-next": Architecture(
        "LlavaNextForConditionalGeneration",
        _llava("llava_next", CLIP, image_grid_pinpoints=PINPOINTS),
        "llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil",
        {"size": {"shortest_edge": 112}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS},
    ),
    # a text model with sliding windows, so narrow that the first image tokens fall out of it
    "llava-next-mistral": Architecture(
        "LlavaNextForConditionalGeneration",
        _llava(
            "llava_next",
            CLIP,
            "mistral",
            text={"sliding_window": 200},
            image_grid_pinpoints=PINPOINTS,
        ),
        "llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil",
        {"size": {"shortest_edge": 112}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS},
    ),
    # tiles that are no whole number of patches, and more patches than four tiles' worth
    "llava-onevision": Architecture(
        "LlavaOnevisionForConditionalGeneration",
        _llava(
            "llava_onevision",
            SIGLIP | {"image_size": 96},
            "qwen2",
            image_grid_pinpoints=[[96 * i, 96 * j] for i in range(1, 5) for j in range(1, 5)],
            vision_aspect_ratio="anyres_max_4",
        ),
        "llava_onevision.image_processing_pil_llava_onevision.LlavaOnevisionImageProcessorPil",
        {
            "size": {"height": 96, "width": 96},
            "image_grid_pinpoints": [[96 * i, 96 * j] for i in range(1, 5) for j in range(1, 5)],
        },
    ),
    "qwen2-vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        _qwen("qwen2_vl", embed_dim=32, hidden_size=64),
        "qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
        {"size": QWEN_PIXELS},
        IMAGE_TOKENS["qwen"],
    ),
    "qwen2.5-vl": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        # with fewer layers llama.cpp's converter does not know the merger's tensors
        _qwen(
            "qwen2_5_vl",
            depth=3,
            hidden_size=32,
            out_hidden_size=64,
            fullatt_block_indexes=[1],
            window_size=56,
        ),
        "qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
        {"size": QWEN_PIXELS},
        IMAGE_TOKENS["qwen"],
    ),
    "qwen3-vl": Architecture(
        "Qwen3VLForConditionalGeneration",
        _qwen(
            "qwen3_vl",
            depth=3,
            hidden_size=32,
            out_hidden_size=64,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        "qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
        {"size": QWEN_PIXELS, "patch_size": 16},
        IMAGE_TOKENS["qwen"],
    ),
    "internvl": Architecture(
        "InternVLForConditionalGeneration",
        _internvl,
        "got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil",
        {"size": SQUARE, "max_patches": 6},
        IMAGE_TOKENS["internvl"],
    ),
    "idefics3": Architecture(
        "Idefics3ForConditionalGeneration",
        _idefics3("idefics3"),
        "idefics3.image_processing_pil_idefics3.Idefics3ImageProcessorPil",
        {"size": {"longest_edge": 336}, "max_image_size": {"longest_edge": 112}},
    ),
    "smolvlm": Architecture(
        "SmolVLMForConditionalGeneration",
        _idefics3("smolvlm"),
        "smolvlm.image_processing_pil_smolvlm.SmolVLMImageProcessorPil",
        {"size": {"longest_edge": 224}, "max_image_size": {"longest_edge": 112}},
    ),
}


def make(name: str | Architecture, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint `name` of ARCHITECTURES, or one of an architecture, to `folder`."""
    transformers = importlib.import_module("transformers")
    architecture = name if isinstance(name, Architecture) else ARCHITECTURES[name]
    tokenizer = _tokenizer(architecture.image_token)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in OTHERS}
    ids |= {"image": tokenizer.convert_tokens_to_ids(architecture.image_token), "size": len(tokenizer)}
    model = getattr(transformers, architecture.model)(architecture.config(ids))
    _randomise(model, seed, tokenizer)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    module, _, cls = architecture.processor.rpartition(".")
    processor = getattr(importlib.import_module(f"transformers.models.{module}"), cls)(
        **architecture.settings
    )
    processor.save_pretrained(folder)
    return folder


def letters_page(size: tuple[int, int] = (300, 220), seed: int = 0) -> Page:
    """A page whose twelve chunks share all printable characters out, some of them given to two chunks.

    A random model says random characters, so most of what it says is found in one chunk.
    """
    rng = np.random.default_rng(seed)
    shuffled = "".join(rng.permutation([chr(code) for code in range(33, 127)]))
    width, height = size[0] / 4, size[1] / 3
    chunks = [
        Chunk(
            shuffled[8 * i : 8 * i + 10],  # neighbours share two characters
            (i % 4 * width, i // 4 * height, (i % 4 + 1) * width, (i // 4 + 1) * height),
        )
        for i in range(12)
    ]
    return Page(f"letters-{seed}", sample_image(size, seed), tuple(chunks))


def letters_folder(folder: Path, n_pages: int) -> Path:
    """The same as a user's folder of pages."""
    folder.mkdir()
    records = []
    for seed in range(n_pages):
        page = letters_page(seed=seed)
        page.image.save(folder / f"{page.name}.png")
        chunks = [{"text": chunk.text, "box": chunk.box} for chunk in page.chunks]
        records.append({"image": f"{page.name}.png", "chunks": chunks})
    (folder / "pages.json").write_text(json.dumps(records))
    return folder
