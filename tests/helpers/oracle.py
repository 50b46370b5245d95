"""The algorithm of DESIGN section 3 in plain PyTorch, on the Hugging Face model: what the patched llama.cpp
must agree with.

A prompt is read with the full cache. Then, per layer and KV head, the last queries vote on the positions
before the window, and the head keeps the winners and the window. Nothing is removed here: decoding masks
what a head has lost, so that positions, rotations and everything else stay those of the original model. What
a head lost can leave a slot, which is attended beside the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
)
from transformers.masking_utils import eager_mask

from helpers.native import MARKER

_ATTENTION = "sparsemm_oracle"

torch.set_num_threads(1)  # the models are so small that a second thread only waits


class _Tap:
    """What one layer's attention listens to, leaves out and adds.

    Attributes:
        listening: remember the queries, keys and values of the next call.
        query, key, value: float32 [heads, tokens, head_dim], query and key after rotation.
        scaling: of the product of a query and a key.
        keep: the prompt positions that each KV head still sees, bool [n_head_kv, n_prompt]; None: all.
        slots: what each KV head has for what it lost, None where it lost nothing.
    """

    def __init__(self, n_head_kv: int) -> None:
        self.listening = False
        self.query = torch.empty(0)
        self.key = torch.empty(0)
        self.value = torch.empty(0)
        self.scaling = 1.0
        self.keep: torch.Tensor | None = None
        self.slots: list[Slot | None] = [None] * n_head_kv

    def forget(self) -> None:
        """Attend to everything, and to nothing else."""
        self.keep = None
        self.slots = [None] * len(self.slots)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    tap: _Tap = module.oracle_tap
    if tap.listening:
        tap.query, tap.key, tap.value, tap.scaling = query[0], key[0], value[0], scaling
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    if tap.keep is not None:
        lost = ~tap.keep.repeat_interleave(group, 0)[None, :, None, :]
        logits[..., : lost.shape[-1]].masked_fill_(lost, -torch.inf)
    n = logits.shape[-1]
    weights = torch.cat([logits, slot_logits(query[0], tap.slots, scaling)[None]], -1).softmax(-1)
    out = weights[..., :n] @ value.repeat_interleave(group, 1)
    lost = [torch.zeros(value.shape[-1]) if slot is None else slot.value for slot in tap.slots]
    out = out + weights[..., n:] * torch.stack(lost).repeat_interleave(group, 0)[None, :, None]
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Slot:
    """The residual slot of a KV head: what stands for all positions that it lost.

    Attributes:
        count: how many they are; its log is added to the slot's logits.
        key, value: float32 [head_dim], means weighted by the attention that the positions got.
    """

    count: int
    key: torch.Tensor
    value: torch.Tensor


def slot_logits(query: torch.Tensor, slots: Sequence[Slot | None], scaling: float) -> torch.Tensor:
    """Attention logits of the residual slots, -inf where a KV head has none.

    Args:
        query: [n_head, n, head_dim].

    Returns:
        [n_head, n, 1].
    """
    group = query.shape[0] // len(slots)
    logits = torch.full((*query.shape[:2], 1), -torch.inf)
    for ih, slot in enumerate(slots):
        if slot is not None:
            heads = slice(ih * group, (ih + 1) * group)
            logits[heads, :, 0] = query[heads] @ slot.key * scaling + np.log(slot.count)
    return logits


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, eager_mask)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the language model gets it.

    Attributes:
        ids: token ids, the image token repeated for each of an image's tokens; int64 [n].
        is_image: which of them are image tokens, bool [n].
        embeds: float32 [1, n, n_embd].
        position_ids: int64 [1, n], or [3, 1, n] under M-RoPE.
        next_pos: position of the first generated token.
        more: what else the decoder is given with these embeddings, such as deepstack's.
    """

    ids: np.ndarray
    is_image: np.ndarray
    embeds: torch.Tensor
    position_ids: torch.Tensor
    next_pos: int
    more: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class OracleResult:
    """What a head kept and what the model then said.

    Attributes:
        kept: kept[layer][head], the prompt positions that a KV head keeps, ascending.
        scores: scores[layer][head], the votes on the positions before the window; empty if the prompt is not
            longer than the window.
        tokens: the greedy answer.
        logits: what it was chosen from, float32 [n_predict, n_vocab].
        slots: slots[layer][head], the residual slots after the prompt.
    """

    kept: list[list[np.ndarray]]
    scores: list[list[np.ndarray]]
    tokens: list[int]
    logits: np.ndarray
    slots: list[list[Slot | None]] = field(default_factory=list)

    @property
    def margins(self) -> np.ndarray:
        """How far the best logit leads the second, in standard deviations of the step's logits."""
        top = np.sort(self.logits, axis=1)
        return (top[:, -1] - top[:, -2]) / self.logits.std(axis=1)


def leads(result: OracleResult, tokens: Sequence[int]) -> np.ndarray:
    """How far each step's likeliest token leads the one in `tokens`, in standard deviations of its logits.

    With `result` of a run that was forced through `tokens`, all zeros mean the same greedy answer, and a
    small number a step at which two tokens were as good as tied.
    """
    logits = result.logits
    return (logits.max(1) - logits[np.arange(len(tokens)), tokens]) / logits.std(1)


@dataclass(frozen=True)
class Grid:
    """The embeddings of an image: float32 [n_rows * n_columns, n_embd], what deepstack adds behind them."""

    embeds: np.ndarray
    n_columns: int


class Oracle:
    """The original of a test model, in float32."""

    def __init__(self, hf_dir: Path, kind: Any = AutoModelForImageTextToText) -> None:
        """Args:
        hf_dir: the checkpoint.
        kind: class of transformers that loads it.
        """
        model = kind.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager").eval()
        self.model = model
        self.tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir)
        inner = model.model
        self.decoder = getattr(inner, "language_model", getattr(inner, "text_model", inner))
        self.decoder.config._attn_implementation = _ATTENTION
        config = self.decoder.config
        self.taps = [_Tap(config.num_key_value_heads) for _ in self.decoder.layers]
        for layer, tap in zip(self.decoder.layers, self.taps, strict=True):
            layer.self_attn.oracle_tap = tap
        self.n_layer: int = config.num_hidden_layers
        self.n_head: int = config.num_attention_heads
        self.n_head_kv: int = config.num_key_value_heads
        self.is_qwen = model.config.model_type == "qwen2_vl"
        self.is_mrope = "mrope_section" in (config.rope_parameters or {})
        self._hf_dir = hf_dir

    @cached_property
    def image_processor(self) -> Any:
        return AutoImageProcessor.from_pretrained(self._hf_dir)

    # --- prompts

    def chat(self, question: str, n_images: int = 0) -> str:
        """The question after `n_images` images in the model's chat template; `MARKER` stands for an image."""
        images = (MARKER if self.is_qwen else f"{MARKER}\n") * n_images
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": images + question}], tokenize=False, add_generation_prompt=True
        )

    @torch.no_grad()
    def prompt(self, text: str, images: Sequence[Image.Image] = (), *, first: bool = True) -> Prompt:
        """Tokens, embeddings and positions of `text`, in which each `MARKER` stands for the next image.

        Positions count from 0. A prompt that is not the first of a conversation has no begin token.
        """
        features: list[torch.Tensor] = []
        grid = None
        if images:
            batch = self.image_processor(list(images))
            pixels = torch.from_numpy(np.asarray(batch["pixel_values"], np.float32))
            if self.is_qwen:
                grid = torch.from_numpy(np.asarray(batch["image_grid_thw"]))
                features = list(self.model.get_image_features(pixels, grid).pooler_output)
            else:
                features = list(self.model.get_image_features(pixels).pooler_output)

        image_token = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        parts = text.split(MARKER)
        if len(parts) != len(features) + 1:
            raise ValueError(f"{len(parts) - 1} markers for {len(features)} images")
        written = parts[0]
        for feature, part in zip(features, parts[1:], strict=True):
            tokens = image_token * len(feature)
            written += (f"<|vision_start|>{tokens}<|vision_end|>" if self.is_qwen else tokens) + part
        ids = torch.tensor([self.tokenizer.encode(written, add_special_tokens=first)])
        is_image = ids == self.model.config.image_token_id
        embeds = self.decoder.embed_tokens(ids)
        if features:
            embeds[is_image] = torch.cat(features)

        if self.is_qwen:
            position_ids, _ = self.model.model.get_rope_index(ids, is_image.int(), image_grid_thw=grid)
        else:
            position_ids = torch.arange(ids.shape[1])[None]
        return Prompt(ids[0].numpy(), is_image[0].numpy(), embeds, position_ids, int(position_ids.max()) + 1)

    @torch.no_grad()
    def prompt_of(self, chunks: Sequence[np.ndarray | Grid]) -> Prompt:
        """A prompt of chunks of text (token ids) and of images, whose embeddings are given.

        Under M-RoPE an image is numbered as Qwen2-VL does it (transformers' get_rope_index): its rows and
        columns count from where the text before it ended, and the text after it goes on behind the larger.
        """
        n_embd = self.decoder.config.hidden_size
        ids, embeds, positions, deep = [], [], [], []
        start = 0
        for chunk in chunks:
            if isinstance(chunk, Grid):
                given = torch.from_numpy(chunk.embeds)
                rows, columns = np.divmod(np.arange(len(given)), chunk.n_columns)
                at = np.stack([np.zeros(len(given), np.int64), rows, columns])
                if not self.is_mrope:
                    at[:] = np.arange(len(given))
                ids.append(np.full(len(given), -1))
                embeds.append(given[:, :n_embd])
                deep.append(given[:, n_embd:])
            else:
                ids.append(chunk)
                embeds.append(self.decoder.embed_tokens(torch.from_numpy(chunk).long()))
                at = np.broadcast_to(np.arange(len(chunk)), (3, len(chunk)))
            positions.append(start + at)
            start = int(positions[-1].max()) + 1
        all_ids = np.concatenate(ids)
        position_ids = torch.from_numpy(np.concatenate(positions, axis=1))[:, None]
        more: dict[str, Any] = {}
        if deep and deep[0].shape[1]:
            more["visual_pos_masks"] = torch.from_numpy(all_ids < 0)[None]
            more["deepstack_visual_embeds"] = list(torch.cat(deep).split(n_embd, dim=1))
        return Prompt(
            all_ids,
            all_ids < 0,
            torch.cat(embeds)[None],
            position_ids if self.is_mrope else position_ids[0],
            start,
            more,
        )

    # --- the algorithm

    @torch.no_grad()
    def run(
        self,
        prompt: Prompt,
        table: np.ndarray | None = None,
        window: int = 32,
        n_predict: int = 32,
        *,
        pool_kernel: int = 7,
        n_vote: int | None = None,
        kept: list[list[np.ndarray]] | None = None,
        force: Sequence[int] | None = None,
        vote: str = "snapkv",
        residual: bool = False,
    ) -> OracleResult:
        """Read the prompt, let every head forget, decode greedily.

        Args:
            table: positions that each KV head keeps, window included, [n_layer, n_head_kv]; None: all.
            window: positions at the end that every head keeps.
            n_vote: queries in the last batch of the prompt, of which the last `window` vote; None: a batch
                that holds the whole prompt.
            kept: decode from these positions instead of the winners.
            force: the tokens to continue with instead of the likeliest; logits are still returned.
            vote: snapkv or mixkv.
            residual: what a head loses leaves a slot, which takes one of the head's places.
        """
        n = len(prompt)
        cache = DynamicCache(config=self.decoder.config)
        for tap in self.taps:
            tap.listening = True
            tap.forget()
        hidden = self.decoder(
            inputs_embeds=prompt.embeds,
            position_ids=prompt.position_ids,
            past_key_values=cache,
            use_cache=True,
            **prompt.more,
        ).last_hidden_state
        for tap in self.taps:
            tap.listening = False

        n_voters = min(window, n if n_vote is None else n_vote, n)
        held = [np.arange(n)] * self.n_head_kv
        attention = [attention_on_held(tap, held, n_voters) for tap in self.taps]
        scores = [
            votes_of(tap, held, attended, window, pool_kernel, vote)
            for tap, attended in zip(self.taps, attention, strict=True)
        ]
        if kept is None:
            budgets = np.full((self.n_layer, self.n_head_kv), n) if table is None else np.asarray(table)
            kept = [
                [
                    choose(votes, positions, int(budget), window, residual=residual)
                    for votes, positions, budget in zip(*heads, strict=True)
                ]
                for heads in zip(scores, [held] * self.n_layer, budgets, strict=True)
            ]
        for tap, heads, attended in zip(self.taps, kept, attention, strict=True):
            if residual:
                tap.slots = fold(tap, held, heads, attended)
            tap.keep = torch.zeros(self.n_head_kv, n, dtype=torch.bool)
            for ih, positions in enumerate(heads):
                tap.keep[ih, torch.from_numpy(np.asarray(positions, np.int64))] = True

        tokens: list[int] = []
        logits = []
        for i in range(n_predict):
            logits.append(self._logits(hidden))
            tokens.append(int(logits[-1].argmax()))
            if i + 1 == n_predict:
                break
            said = torch.tensor([[tokens[-1] if force is None else force[i]]])
            position = torch.full((1, 1), prompt.next_pos + i)
            hidden = self.decoder(
                inputs_embeds=self.decoder.embed_tokens(said),
                position_ids=position.expand(3, 1, 1) if self.is_mrope else position,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        slots = [tap.slots for tap in self.taps]
        for tap in self.taps:
            tap.forget()
        return OracleResult(kept, scores, tokens, np.array(logits), slots)

    def _logits(self, hidden: torch.Tensor) -> np.ndarray:
        """Of the last position: float32 [n_vocab]."""
        logits = self.model.lm_head(hidden[0, -1]) / getattr(self.decoder.config, "logits_scaling", 1)
        return np.asarray(logits)

    def conversation(
        self,
        window: int,
        pool_kernel: int = 7,
        *,
        max_tail: int | None = None,
        vote: str = "snapkv",
        residual: bool = False,
    ) -> Conversation:
        """Prompts and answers in turn over one cache; every prompt ends in an eviction."""
        return Conversation(self, window, pool_kernel, max_tail, vote, residual)


class Conversation:
    """Several prompts over one cache: each evicts among what a head still holds, pooled in position order.

    Attributes:
        held: held[layer][head], the positions that a KV head holds, ascending.
        slots: slots[layer][head], the residual slot of a KV head, None if it has none.
        logits: what the next token is chosen from, float32 [n_vocab].
    """

    def __init__(
        self,
        oracle: Oracle,
        window: int,
        pool_kernel: int,
        max_tail: int | None,
        vote: str,
        residual: bool,
    ) -> None:
        """Args:
        max_tail: most generated positions that a head holds, the oldest go first; None: all of them.
        vote, residual: as of Oracle.run.
        """
        self.vote, self.residual = vote, residual
        self.slots: list[list[Slot | None]] = [[None] * oracle.n_head_kv for _ in range(oracle.n_layer)]
        self.attention: list[list[torch.Tensor]] = []  # of the last prompt's voters, on what was held
        self.oracle, self.window, self.pool_kernel = oracle, window, pool_kernel
        self.max_tail = max_tail
        self.generated: list[int] = []  # held positions that were said since the last prompt
        self.cache = DynamicCache(config=oracle.decoder.config)
        self.held = [[np.empty(0, np.int64)] * oracle.n_head_kv for _ in range(oracle.n_layer)]
        self.logits = np.empty(0, np.float32)
        self.n = 0
        self.next_pos = 0

    def read(self, prompt: Prompt, table: np.ndarray) -> OracleResult:
        """Append a prompt and say what each head would keep then; keep() makes it so."""
        oracle, n_new = self.oracle, len(prompt)
        for tap in oracle.taps:
            tap.listening = True
        self._append(prompt.embeds, prompt.position_ids + self.next_pos, prompt.next_pos)
        kept, scores = [], []
        self.attention = []
        for il, tap in enumerate(oracle.taps):
            tap.listening = False
            held = self.held[il]
            tap.slots = self.slots[il]
            self.attention.append(attention_on_held(tap, held, min(self.window, n_new)))
            scores.append(votes_of(tap, held, self.attention[il], self.window, self.pool_kernel, self.vote))
            kept.append(
                [
                    choose(
                        scores[il][ih],
                        held[ih],
                        int(table[il, ih]),
                        self.window,
                        residual=self.residual,
                        has_slot=self.slots[il][ih] is not None,
                    )
                    for ih in range(oracle.n_head_kv)
                ]
            )
        return OracleResult(kept, scores, [], self.logits[None])

    def read_tokens(self, ids: Sequence[int], table: np.ndarray) -> OracleResult:
        """The same for a prompt of text tokens."""
        tokens = torch.tensor([list(ids)])
        positions = torch.arange(len(ids))[None]
        if self.oracle.is_qwen:
            positions = positions.expand(3, 1, -1)
        embeds = self.oracle.decoder.embed_tokens(tokens).detach()
        none = np.zeros(len(ids), bool)
        return self.read(Prompt(np.asarray(ids), none, embeds, positions, len(ids)), table)

    def keep(self, kept: list[list[np.ndarray]]) -> None:
        """The heads hold these positions from now on, and slots for what they lose by that."""
        if self.residual:
            for il, tap in enumerate(self.oracle.taps):
                tap.slots = self.slots[il]
                self.slots[il] = fold(tap, self.held[il], kept[il], self.attention[il])
        self.held = [[np.asarray(head, np.int64) for head in heads] for heads in kept]
        self.generated = []

    def say(self, token: int) -> None:
        """Append one token."""
        if len(self.generated) == self.max_tail:
            oldest = self.generated.pop(0)
            self.held = [[head[head != oldest] for head in heads] for heads in self.held]
        self.generated.append(self.n)
        embeds = self.oracle.decoder.embed_tokens(torch.tensor([[token]])).detach()
        positions = torch.zeros((3, 1, 1) if self.oracle.is_qwen else (1, 1), dtype=torch.int64)
        self._append(embeds, positions + self.next_pos, 1)

    def truncate(self, n: int) -> None:
        """Drop all but the first n positions; those that go are text. What was lost stays in the slots."""
        self.cache.crop(n - self.n)
        self.next_pos -= self.n - n
        self.n = n
        self.held = [[head[head < n] for head in heads] for heads in self.held]
        self.generated = [position for position in self.generated if position < n]

    @torch.no_grad()
    def _append(self, embeds: torch.Tensor, position_ids: torch.Tensor, n_pos: int) -> None:
        oracle = self.oracle
        for tap, heads, slots in zip(oracle.taps, self.held, self.slots, strict=True):
            tap.keep, tap.slots = None, slots
            if self.n:
                tap.keep = torch.zeros(oracle.n_head_kv, self.n, dtype=torch.bool)
                for ih, positions in enumerate(heads):
                    tap.keep[ih, torch.from_numpy(positions)] = True
        hidden = oracle.decoder(
            inputs_embeds=embeds, position_ids=position_ids, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        self.logits = oracle.model.lm_head(hidden[0, -1]).numpy()
        appended = np.arange(self.n, self.n + embeds.shape[1])
        self.held = [[np.concatenate([head, appended]) for head in heads] for heads in self.held]
        self.n += embeds.shape[1]
        self.next_pos += n_pos
        for tap in oracle.taps:
            tap.forget()


def attention_of_the_last(query: torch.Tensor, key: torch.Tensor, n_voters: int) -> torch.Tensor:
    """Attention weights of the last `n_voters` queries, causal among themselves.

    Args:
        query: [n_head, n, head_dim], key: [n_head_kv, n, head_dim], after rotation.

    Returns:
        float32 [n_head, n_voters, n], rows sum to 1.
    """
    return masked_logits(query, key, n_voters, query.shape[-1] ** -0.5).softmax(-1)


def masked_logits(query: torch.Tensor, key: torch.Tensor, n_voters: int, scaling: float) -> torch.Tensor:
    """What attention_of_the_last takes the softmax of."""
    n = key.shape[1]
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    logits = query[:, -n_voters:] @ key.transpose(1, 2) * scaling
    own = torch.arange(n - n_voters, n)
    return logits.masked_fill(torch.arange(n)[None] > own[:, None], -torch.inf)


def attention_on_held(tap: _Tap, held: Sequence[np.ndarray], n_voters: int) -> list[torch.Tensor]:
    """The mean attention that what a KV head holds gets from the last queries of its GQA group.

    Args:
        held: held[head], the positions that a KV head holds, ascending.

    Returns:
        For each head float32 [n_held + 1]; the last is the residual slot's, 0 if there is none.
    """
    group = tap.query.shape[0] // len(held)
    logits = masked_logits(tap.query, tap.key, n_voters, tap.scaling)
    slots = slot_logits(tap.query[:, -n_voters:], tap.slots, tap.scaling)
    found = []
    for ih, positions in enumerate(held):
        heads = slice(ih * group, (ih + 1) * group)
        both = torch.cat([logits[heads][:, :, torch.from_numpy(positions)], slots[heads]], -1)
        found.append(both.softmax(-1).mean((0, 1)))
    return found


def votes_of(
    tap: _Tap,
    held: Sequence[np.ndarray],
    attention: Sequence[torch.Tensor],
    window: int,
    pool_kernel: int,
    vote: str,
) -> list[np.ndarray]:
    """Per KV head the votes on what it holds before the window.

    `snapkv`: the attention, pooled over neighbours among what is held. `mixkv`: importance, which is that
    times the norm of the value, and diversity, which is how little a key is like the mean of the unit keys;
    mixed by how alike the keys are, both from 0 to 1 over the candidates.

    Args:
        held: held[head], the positions that a KV head holds, ascending.
        attention: what attention_on_held found.

    Returns:
        For each head float32 [n - window], 0 where it holds nothing; empty if n is not above the window.
    """
    n_before = max(tap.key.shape[1] - window, 0)
    found = []
    for ih, positions in enumerate(held):
        candidates = positions[: max(len(positions) - window, 0)]
        scores = np.zeros(n_before, np.float32)
        if len(candidates):
            mean = attention[ih][None, None, : len(candidates)]
            pooled = torch.nn.functional.max_pool1d(mean, pool_kernel, stride=1, padding=pool_kernel // 2)
            votes = pooled[0, 0]
            if vote == "mixkv":
                at = torch.from_numpy(candidates)
                votes = mixed_votes(votes, tap.key[ih, at], tap.value[ih, at])
            scores[candidates] = votes.numpy()
        found.append(scores)
    return found


def mixed_votes(importance: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention [n], mixed with what keys and values [n, head_dim] of the same candidates say: [n]."""
    unit = key / key.norm(dim=-1, keepdim=True)
    mean = unit.mean(0)
    diversity = -(unit @ mean) / mean.norm()
    alike = mean.square().sum()

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-20)

    return (1 - alike) * scaled(importance * value.norm(dim=-1)) + alike * scaled(diversity)


def choose(
    scores: np.ndarray,
    held: np.ndarray,
    budget: int,
    window: int,
    *,
    residual: bool = False,
    has_slot: bool = False,
) -> np.ndarray:
    """The positions that a head with this budget keeps of those it holds, ascending: top scores, then the
    window, which ends with the last position that it holds. A head that loses any spends a place on its slot.
    """
    if len(held) + has_slot <= budget:
        return held
    candidates = held[: max(len(held) - window, 0)]
    n_chosen = max(budget - residual - window, 0)
    winners = np.argsort(-scores[candidates], kind="stable")[:n_chosen]
    return np.concatenate([np.sort(candidates[winners]), held[len(candidates) :]])


def fold(
    tap: _Tap, held: Sequence[np.ndarray], kept: Sequence[np.ndarray], attention: Sequence[torch.Tensor]
) -> list[Slot | None]:
    """The residual slots of the KV heads after they kept these positions of those that they held.

    Args:
        tap: with the keys and values of all positions, and the slots so far.
        attention: what attention_on_held found.
    """
    slots: list[Slot | None] = []
    for ih, slot in enumerate(tap.slots):
        lost = np.setdiff1d(held[ih], kept[ih])
        if not len(lost):
            slots.append(slot)
            continue
        weights = attention[ih][torch.from_numpy(np.searchsorted(held[ih], lost))]
        keys, values = (each[ih, torch.from_numpy(lost)] for each in (tap.key, tap.value))
        counts = torch.ones(len(lost))
        if slot is not None:
            weights = torch.cat([weights, attention[ih][-1:]])
            keys, values = torch.cat([keys, slot.key[None]]), torch.cat([values, slot.value[None]])
            counts = torch.cat([counts, torch.tensor([float(slot.count)])])
        if not weights.any():
            weights = counts
        weights = weights / weights.sum()
        slots.append(Slot(int(counts.sum()), weights @ keys, weights @ values))
    return slots


@dataclass(frozen=True)
class Agreement:
    """How well a kept set agrees with the oracle's.

    Attributes:
        n_kept: positions that the oracle keeps, all heads together.
        n_same: those that the other keeps too.
        n_unexplained: differences whose score is not within `rtol` of the score at the cut.
    """

    n_kept: int
    n_same: int
    n_unexplained: int

    @property
    def share(self) -> float:
        return self.n_same / self.n_kept


def compare_kept(result: OracleResult, kept: list[list[np.ndarray]], rtol: float = 2e-2) -> Agreement:
    """Compare kept positions with the oracle's; ties and rounding at the cut count as explained.

    A head that keeps another number of positions than the oracle's is unexplained in all of them.
    """
    n_kept = n_same = n_unexplained = 0
    for il, heads in enumerate(result.kept):
        for ih, expected in enumerate(heads):
            found = np.asarray(kept[il][ih])
            n_kept += len(expected)
            if len(found) != len(expected) or len(np.unique(found)) != len(found):
                n_unexplained += len(expected)
                continue
            differ = np.setxor1d(expected, found)
            n_same += len(expected) - len(differ) // 2
            if len(differ) == 0:
                continue
            scores = result.scores[il][ih]
            if differ.max() >= len(scores):  # a position of the window
                n_unexplained += len(differ)
                continue
            cut = scores[expected[expected < len(scores)]].min()
            n_unexplained += int((np.abs(scores[differ] - cut) > rtol * cut).sum())
    return Agreement(n_kept, n_same, n_unexplained)
