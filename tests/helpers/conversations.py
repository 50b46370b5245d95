"""What the tests of conversations ask the small LLaVA of the fixture `llava`, and how it evicts."""

from __future__ import annotations

from typing import Any

from sparsemm_edge.runtime import Conversation, Eviction

EVICTION = Eviction(policy="uniform", budget=24, window=8)
OPTIONS = ("--policy", "uniform", "--budget", "24", "--window", "8", "--threads", "1")
"""The same on the command line."""
QUESTIONS = ("What is written here?", "And what here, on the other one?", "Which of the two is longer?")


def said(conversation: Conversation, *arguments: Any, **options: Any) -> tuple[int, ...]:
    """The tokens of an answer."""
    list(conversation.ask(*arguments, n_predict=12, **options))
    return conversation.stats().tokens
