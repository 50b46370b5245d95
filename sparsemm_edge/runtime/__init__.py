"""Text and images through the patched llama.cpp; the only part of the package that imports llama_cpp."""

from sparsemm_edge.runtime.context import CACHE_TYPES, Context, KVStats, context_for
from sparsemm_edge.runtime.conversation import Conversation, GenerationStats, Timings
from sparsemm_edge.runtime.encode import Cancelled, EncodedPrompt, encode
from sparsemm_edge.runtime.eviction import Eviction
from sparsemm_edge.runtime.generate import Generation, generate
from sparsemm_edge.runtime.loading import Loading, Lora
from sparsemm_edge.runtime.model import VisionModel
from sparsemm_edge.runtime.prompt import Prompt, image_marker
from sparsemm_edge.runtime.sampler import Sampling

__all__ = [
    "CACHE_TYPES",
    "Cancelled",
    "Context",
    "Conversation",
    "EncodedPrompt",
    "Eviction",
    "Generation",
    "GenerationStats",
    "KVStats",
    "Loading",
    "Lora",
    "Prompt",
    "Sampling",
    "Timings",
    "VisionModel",
    "context_for",
    "encode",
    "generate",
    "image_marker",
]
