"""The time to the first token: its parts, and what limits each of them."""

from dataclasses import dataclass, replace
from typing import Any

_BOUND_BY_MEMORY = 0.5
"""A part that reads weights at this share of the rate that memory gives, or faster, is limited by memory."""


@dataclass(frozen=True)
class Part:
    """One part of the time to the first token.

    Attributes:
        ms: milliseconds.
        n_threads: threads that it used.
        weight_bytes: weights that it read from memory; a batch of tokens or an image reads all of them once.
    """

    ms: float = 0.0
    n_threads: int = 1
    weight_bytes: int = 0

    def limit(self, bytes_per_s: float | None) -> str | None:
        """`compute` or `memory bandwidth`.

        Args:
            bytes_per_s: how fast this machine reads memory; None: not known.

        Returns:
            None if the part took no time, or if it reads weights and `bytes_per_s` is not known.
        """
        if not self.ms or (self.weight_bytes and not bytes_per_s):
            return None
        rate = self.weight_bytes / self.ms * 1000
        return "memory bandwidth" if bytes_per_s and rate >= _BOUND_BY_MEMORY * bytes_per_s else "compute"


@dataclass(frozen=True)
class FirstToken:
    """The time to the first token.

    Attributes:
        total_ms: from the question to the first token, without loading the model. The rest beyond the parts
            is the chat template and creating the context.
        images: decoding the files, cutting and resizing.
        vision: the image encoder.
        prompt: the text model reading the prompt.
        token: choosing the token.
    """

    total_ms: float = 0.0
    images: Part = Part()
    vision: Part = Part()
    prompt: Part = Part()
    token: Part = Part()

    def with_opening(self, ms: float) -> "FirstToken":
        """The same with the time that opening the images took beforehand."""
        images = replace(self.images, ms=self.images.ms + ms)
        return replace(self, total_ms=self.total_ms + ms, images=images)

    def parts(self) -> dict[str, Part]:
        return {"images": self.images, "vision": self.vision, "prompt": self.prompt, "token": self.token}

    def to_dict(self, bytes_per_s: float | None) -> dict[str, Any]:
        """For JSON: `total_ms`, and for each part `ms`, `threads` and `limit` (see Part.limit)."""
        return {
            "total_ms": self.total_ms,
            **{
                name: {"ms": part.ms, "threads": part.n_threads, "limit": part.limit(bytes_per_s)}
                for name, part in self.parts().items()
            },
        }

    def in_words(self, bytes_per_s: float | None) -> str:
        """One line; parts that took no time are left out. `bytes_per_s`: see Part.limit."""
        names = {
            "images": "images decoded and resized",
            "vision": "image encoder",
            "token": "choosing the token",
        }
        said = []
        for name, part in self.parts().items():
            if part.ms:
                threads = "1 thread" if part.n_threads == 1 else f"{part.n_threads} threads"
                limit = part.limit(bytes_per_s)
                limited = f"limited by {limit}, " if limit else ""
                said.append(f"{names.get(name, name)} {part.ms:.0f} ms ({limited}{threads})")
        return f"first token after {self.total_ms:.0f} ms: {', '.join(said)}"
