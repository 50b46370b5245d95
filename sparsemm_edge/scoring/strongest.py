"""The position that each head of a PyTorch model attends to most, for each generated token.

Attention weights of size prompt x prompt are never stored. Each attention layer is computed as usual (sdpa),
and the strongest position of the last query is computed beside it: one number per head and token, which is
all that the scores need.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_ATTENTION = "sparsemm_target_response"


_Found = list[torch.Tensor]
"""The strongest positions of one layer's heads, [n_head] for each forward pass."""


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if module.sparsemm_tap is not None:
        n_prompt, found = module.sparsemm_tap
        # a layer with a sliding window holds only the end of the context
        offset = n_prompt + len(found) - key.shape[2]
        found.append(_strongest(query, key, attention_mask) + offset)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _strongest(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The key that each head's last query attends to most: int64 [n_head].

    The largest logit is the largest weight, so there is no softmax. Computed in float32: in half precision
    the largest of thousands of weights is often a tie.

    Args:
        query: [1, n_head, n, head_dim].
        key: [1, n_head_kv, n_kv, head_dim].
        mask: None, or [1, 1 or n_head, n, n_kv]; bool (True: visible) or added to the logits.
    """
    n_head, n_head_kv = query.shape[1], key.shape[1]
    row = query[0, :, -1].float().view(n_head_kv, n_head // n_head_kv, -1)
    logits = (row @ key[0].float().transpose(1, 2)).view(n_head, -1)
    if mask is not None:
        seen = mask[0, :, -1, : logits.shape[1]]
        logits = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen.float()
    return logits.argmax(dim=1)


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


@contextmanager
def strongest_positions(decoder: Any, attentions: Sequence[Any], n_prompt: int) -> Iterator[list[_Found]]:
    """Context manager that records each head's strongest position in every forward pass.

    Yields what is found in each layer; `table` reads it.
    """
    if decoder.config._attn_implementation != _ATTENTION:
        decoder.set_attn_implementation(_ATTENTION)
    layers: list[_Found] = [[] for _ in attentions]
    for attention, found in zip(attentions, layers, strict=True):
        attention.sparsemm_tap = n_prompt, found
    try:
        yield layers
    finally:
        for attention in attentions:
            attention.sparsemm_tap = None


def table(layers: list[_Found]) -> npt.NDArray[np.int64]:
    """The strongest positions: [n_passes, n_layer, n_head]."""
    return np.stack([torch.stack(found).cpu().numpy() for found in layers], axis=1)
