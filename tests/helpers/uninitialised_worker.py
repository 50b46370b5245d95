"""What models compute in buffers of zeros and of NaN, for test_uninitialised_memory.py.

Arguments: triples of name, model and mmproj. Prints a JSON object: name -> what is not the same, or None.
"""

import ctypes
import json
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

from sparsemm_edge.runtime import VisionModel
from sparsemm_edge.runtime.context import Context
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.library import llama
from sparsemm_edge.runtime.prompt import ImagePart, image_marker

ZEROS, NANS = 0x00, 0xFF
TEXTS = (
    f"USER: Look at this {image_marker()} and say what it shows, in the words of the page. ASSISTANT:",
    f" USER: And here? {image_marker()} ASSISTANT:",
)


def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 120, 150, 3)).astype(np.uint8)
    return [Image.fromarray(page) for page in pixels]


def computed(model_path: str, mmproj: str) -> Iterator[tuple[str, np.ndarray]]:
    with VisionModel.load(model_path, mmproj, n_threads=1) as model:
        prompts = [
            model.tokenize(text, [image], first=not turn)
            for turn, (text, image) in enumerate(zip(TEXTS, images(), strict=True))
        ]
        for turn, prompt in enumerate(prompts):
            for i, part in enumerate(prompt.parts):
                if isinstance(part, ImagePart):
                    yield f"embeddings of part {i} of turn {turn}", model.encode_image(part)
        shape = model.shape
        for budget in (None, 24):
            table = None
            if budget is not None:
                budgets = np.full((shape.n_layer, shape.n_head_kv), budget, np.uint32)
                table = HeadBudgetTable(budgets, 8, 7, None, "mixkv", True)
            with Context(model, table, n_ctx=1024) as context:
                for turn, prompt in enumerate(prompts):
                    context.prefill(encode(model, prompt, context.n_past))
                    for step in range(4):
                        yield f"logits with budget {budget} of turn {turn}, step {step}", context.logits()
                        context.decode(10 + step)
        for prompt in prompts:
            prompt.close()


def main(arguments: list[str]) -> None:
    preloaded = ctypes.CDLL(None)
    for name, function in (
        ("next", "ggml_backend_buft_alloc_buffer"),
        ("clear", "ggml_backend_buffer_clear"),
    ):
        pointer = ctypes.cast(getattr(llama._lib, function), ctypes.c_void_p)
        ctypes.c_void_p.in_dll(preloaded, f"alloc_{name}").value = pointer.value
    fill = ctypes.c_int.in_dll(preloaded, "alloc_fill")
    found: dict[str, str | None] = {}
    for name, model, mmproj in zip(*[iter(arguments)] * 3, strict=True):
        fill.value = ZEROS
        expected = dict(computed(model, mmproj))
        fill.value = NANS
        found[name] = None
        for what, values in computed(model, mmproj):
            if not np.array_equal(values, expected[what]):
                found[name] = what
                break
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
