"""llama.cpp's built-in chat templates, for model files without one."""

import ctypes
import re
from collections.abc import Mapping, Sequence
from functools import cache

from sparsemm_edge.runtime.library import llama

# What suggests a template: the kind of projector where it decides, then a part of the file's name, the first
# that fits, then the kind of projector that LLaVA has
_PROJECTORS = {"ldp": "deepseek", "ldpv2": "deepseek", "pixtral": "mistral-v7", "gemma3": "gemma"}
_NAMES = (
    (r"vicuna", "vicuna"),
    (r"llama-?3", "llama3"),
    (r"llama-?2", "llama2"),
    (r"mistral", "mistral-v1"),
    (r"hermes|34b|qwen|yi-|chatml", "chatml"),
    (r"gemma", "gemma"),
    (r"phi-?3", "phi3"),
    (r"deepseek", "deepseek"),
    (r"llava", "vicuna"),
)
_LLAVA_PROJECTORS = ("mlp", "mlp_norm")


@cache
def names() -> tuple[str, ...]:
    """The names, as llama.cpp orders them."""
    n = llama.llama_chat_builtin_templates(None, 0)
    found = (ctypes.c_char_p * n)()
    llama.llama_chat_builtin_templates(found, n)
    return tuple(sorted(name.decode() for name in found if name))


def apply(name: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Render (role, content) messages, up to the start of the reply.

    Raises:
        ValueError: llama.cpp cannot render them.
    """
    pairs = [(message["role"].encode(), message["content"].encode()) for message in messages]
    chat = (llama.llama_chat_message * len(pairs))(*(llama.llama_chat_message(*pair) for pair in pairs))
    size = 1024
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama.llama_chat_apply_template(name.encode(), chat, len(pairs), True, buffer, size)
        if n < 0:
            raise ValueError(f"llama.cpp has no template {name}")
        if n <= size:
            return buffer.raw[:n].decode("utf-8", "replace")
        size = n


def suggestion(file_name: str, projector: str | None) -> str | None:
    """The template that probably fits a model file, from its name and its projector type."""
    if projector in _PROJECTORS:
        return _PROJECTORS[projector]
    name = file_name.lower().replace("_", "-")
    last = "vicuna" if projector in _LLAVA_PROJECTORS else None
    return next((template for pattern, template in _NAMES if re.search(pattern, name)), last)
