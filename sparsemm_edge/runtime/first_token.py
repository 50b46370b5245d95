"""The time to the first token: what it consists of, and what limits each part."""

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
        total_ms: from the question to the first token; loading the model is not part of it. What it is longer
            than the parts together went into the chat template and into making the context.
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
        """The same where the images had been opened before, which took so long."""
        images = replace(self.images, ms=self.images.ms + ms)
        return replace(self, total_ms=self.total_ms + ms, images=images)

    def parts(self) -> dict[str, Part]:
        return {"images": self.images, "vision": self.vision, "prompt": self.prompt, "token": self.token}

    def to_dict(self, bytes_per_s: float | None) -> dict[str, Any]:
        """As JSON has it: `total_ms`, and for each part `ms`, `threads` and `limit` (see Part.limit)."""
        return {
            "total_ms": self.total_ms,
            **{
                name: {"ms": part.ms, "threads": part.n_threads, "limit": part.limit(bytes_per_s)}
                for name, part in self.parts().items()
            },
        }


def in_words(first_token: dict[str, Any]) -> str:
    """One line for what FirstToken.to_dict returned; parts that took no time are left out."""
    names = {"images": "images decoded and resized", "vision": "image encoder", "prompt": "prompt"}
    said = []
    for name, what in {**names, "token": "choosing the token"}.items():
        part = first_token[name]
        if part["ms"]:
            threads = "1 thread" if part["threads"] == 1 else f"{part['threads']} threads"
            limit = f"limited by {part['limit']}, " if part["limit"] else ""
            said.append(f"{what} {part['ms']:.0f} ms ({limit}{threads})")
    return f"first token after {first_token['total_ms']:.0f} ms: {', '.join(said)}"
