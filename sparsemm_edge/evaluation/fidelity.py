"""Fidelity: how close answers stay to those of the full cache, without labels."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def compare(
    full: Sequence[int],
    tokens: Sequence[int],
    full_logits: npt.NDArray[np.float32],
    logits: npt.NDArray[np.float32],
) -> tuple[float, int | None, float]:
    """Compare an answer with the full cache's.

    Args:
        full: the full cache's greedy answer, its end token included.
        tokens: this cache's greedy answer, likewise.
        full_logits: [n, n_vocab], the full cache's before each token of its own answer.
        logits: [n, n_vocab], this cache's before each token of the full cache's answer.

    Returns:
        The fraction of equal tokens at the same place, of the longer answer, 0 to 1, where end tokens count;
        the index of the first different token, None if there is none; and the KL divergence of next-token
        distributions, full cache || this one, in nats: mean over the full cache's answer.
    """
    longer = max(len(full), len(tokens))
    same = [mine == theirs for mine, theirs in zip(tokens, full, strict=False)]
    differs = [place for place, each in enumerate(same) if not each]
    first = differs[0] if differs else (len(same) if len(full) != len(tokens) else None)
    return sum(same) / longer, first, float(kl_divergence(full_logits, logits).mean())


def kl_divergence(logits: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """KL(p || q) in nats from logits: [n, n_vocab] twice -> [n]."""
    log_p, log_q = log_softmax(logits), log_softmax(other)
    divergence: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return np.maximum(divergence, 0.0)  # rounding


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Logarithms of probabilities, row by row."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs
