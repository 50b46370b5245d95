"""Text and images through the patched llama.cpp; the only part of the package that imports llama_cpp."""

from sparsemm_edge.runtime.conversation import Conversation, GenerationStats, Timings
from sparsemm_edge.runtime.eviction import Eviction
from sparsemm_edge.runtime.generate import Generation, generate
from sparsemm_edge.runtime.loading import Loading, Lora
from sparsemm_edge.runtime.model import VisionModel
from sparsemm_edge.runtime.prompt import Prompt, image_marker
from sparsemm_edge.runtime.sampler import Sampling
from sparsemm_edge.runtime.session import CACHE_TYPES, Cancelled, KVStats, Session, start_session

__all__ = [
    "CACHE_TYPES",
    "Cancelled",
    "Conversation",
    "Eviction",
    "Generation",
    "GenerationStats",
    "KVStats",
    "Loading",
    "Lora",
    "Prompt",
    "Sampling",
    "Session",
    "Timings",
    "VisionModel",
    "generate",
    "image_marker",
    "start_session",
]
