#!/usr/bin/env python3
"""What memory does scoring a page take on a model of LLaVA-1.5-7B's shape? Random bfloat16 weights, CPU.

    measure_score_memory.py [--layers 32] [--tokens 64]

Makes the model in memory (nothing is downloaded or written), scores one page of sparsemm_edge's documents and
prints the size of the weights, the resident peak while the page is scored, and the difference, which is what
a page takes beside the weights. With fewer --layers a small machine can tell: the weights grow with the
layers, what a page takes beside them grows by its keys and values alone (16 KiB a position and layer).
"""

from __future__ import annotations

import argparse
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from sparsemm_edge.pages.documents import PROMPT, document_page  # noqa: E402
from sparsemm_edge.scoring.models import VisionLanguageModel  # noqa: E402
from sparsemm_edge.scoring.target_response import score_page  # noqa: E402

GIB = 2**30


def model_of_shape(n_layer: int) -> VisionLanguageModel:
    """LLaVA-1.5-7B with random weights: CLIP ViT-L/14 at 336 pixels, 4096 wide, 32 heads."""
    import tempfile

    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from make_test_models import LLAVA_TEMPLATE, _llava_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer, vocab = _llava_tokenizer(Path(folder))
    tokenizer.chat_template = LLAVA_TEMPLATE
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=n_layer,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
        ),
        image_token_index=vocab.index("<image>"),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.to(torch.bfloat16)
    model.to_empty(device="cpu")
    _fill(model)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return VisionLanguageModel("7B shape", model, tokenizer, processor)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random weights by repeating a block, as 7 billion draws would take minutes; constants as they are."""
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        if "norm" in name and name.endswith("weight"):
            flat.fill_(1)
            continue
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block[: len(part)])
    for module in model.modules():  # what is computed rather than stored
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.__init__(module.config)  # type: ignore[misc]


class Peak:
    """The largest resident size of this process within the block, and its size at the beginning."""

    def __enter__(self) -> Peak:
        self._process = psutil.Process()
        self.before = self.most = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, self._process.memory_info().rss)

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the answer")
    arguments = parser.parse_args()

    model = model_of_shape(arguments.layers)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.model.parameters())
    page = document_page(0)
    started = time.monotonic()
    with Peak() as peak:
        result = score_page(model, page, PROMPT, arguments.tokens)
    seconds = time.monotonic() - started
    n_prompt = model.prompt(PROMPT, page.image).n_tokens
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{arguments.layers} layers, prompt {n_prompt} tokens, answer {result.n_tokens} tokens")
    print(f"weights                        {weights / GIB:6.2f} GiB")
    print(f"resident before the page       {peak.before / GIB:6.2f} GiB")
    print(f"resident peak, the page        {peak.most / GIB:6.2f} GiB")
    print(f"  of which beside the weights  {(peak.most - weights) / GIB:6.2f} GiB")
    print(f"resident peak of the process   {of_process:6.2f} GiB")
    print(f"seconds for the page           {seconds:6.1f}")


if __name__ == "__main__":
    main()
