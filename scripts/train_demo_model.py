#!/usr/bin/env python3
"""Train the demo model: a tiny LLaVA, from nothing, that reads the pages of sparsemm_edge/pages/grid.py.

    train_demo_model.py train --out DIR --minutes 85            train, or go on from DIR/checkpoint.pt
    train_demo_model.py train --from HF_DIR --out DIR --lr 3e-4 --minutes 40    train a model on
    train_demo_model.py export --out DIR HF_DIR         write the checkpoint's model as models/demo holds it
    train_demo_model.py evaluate HF_DIR                 ask it about held-out pages, in PyTorch

The same through llama.cpp, first questions only: sparsemm-edge eval --data grid --policies full.

Options before the command choose another model and other pages; models/demo/README.md has an example.

Two stages. First the vision tower and the projector learn, with throw-away heads, which character is in a
patch and where the patch is. Then the text model learns to read the page and to look keys up: several
conversations about one page share its image, the number of lines grows as accuracy allows, and blank patches
are left out at first and come back step by step (patches keep their positions). Conversations are of single
questions at first and of up to six in turn later on. Learning rate and phases follow the processor time, so
that --minutes says when it ends on a machine that does nothing else.

DIR/log.jsonl gets a line every 20 steps, and every few minutes one about held-out pages.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from demo_tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    ID,
    IMAGE,
    PAD,
    VOCAB,
    encode,
    patch_tokenizer_config,
    save_tokenizer,
)
from sparsemm_edge.evaluation.metrics import character_accuracy
from sparsemm_edge.files import atomic_path
from sparsemm_edge.pages.grid import (
    CELL,
    DIGITS,
    FIRST_TRAINING_SEED,
    GRIDS,
    LETTERS,
    LOOKUP_PROMPTS,
    READ_PROMPT,
    READ_PROMPTS,
    Grid,
    GridPage,
    Line,
    draw_lines,
    grid_page,
    lookup_prompt,
)

GLYPHS = LETTERS + DIGITS
PREFIX = [BOS, *encode("USER: ")]  # before the image


def question_tokens(question: str, first: bool) -> list[int]:
    """What stands before an answer: behind the image, or behind the EOS of the answer before."""
    return encode(f"\n{question} ASSISTANT:" if first else f"USER: {question} ASSISTANT:")


# --- model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What is chosen of the model; the rest is the demo model's.

    Attributes:
        grid: the pages it reads.
        n_layer, n_head, width: of the text model.
    """

    grid: Grid
    n_layer: int
    n_head: int
    width: int


def make_config(shape: Shape) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=shape.grid.size,
            patch_size=CELL,
        ),
        text_config=LlamaConfig(
            vocab_size=len(VOCAB),
            hidden_size=shape.width,
            intermediate_size=2 * shape.width,
            num_hidden_layers=shape.n_layer,
            num_attention_heads=shape.n_head,
            num_key_value_heads=shape.n_head,
            head_dim=32,
            max_position_embeddings=2048,
            # with the usual 10000, most of a head's 16 pairs turn by radians over a page
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            rms_norm_eps=1e-5,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        ),
        image_token_index=IMAGE,
        image_seq_length=shape.grid.side**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def make_model(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        table = model.model.vision_tower.embeddings.position_embedding.weight
        table[1:] = _sine_table(table.shape[1], config.vision_config.image_size // CELL)
        for layer in model.model.language_model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight.normal_(0, 0.05)
            for linear in (attention.o_proj, mlp.down_proj):
                linear.weight.normal_(0, 0.05 / math.sqrt(2 * len(model.model.language_model.layers)))
            # every second head starts out looking for what is like its query
            query = attention.q_proj.weight.unflatten(0, (-1, 32))
            key = attention.k_proj.weight.unflatten(0, (-1, 32))
            key[::2] = 0.8 * query[::2] + 0.6 * key[::2]
        model.model.language_model.embed_tokens.weight.normal_(0, 0.3)
        model.lm_head.weight.normal_(0, 0.02)
    return model


def _sine_table(width: int, side: int) -> Tensor:
    """A start for CLIP's learned positions: sines of row and column, [side * side, width]."""
    frequency = math.pi * 2.0 ** (-torch.arange(width // 4) / (width // 4) * math.log2(2 * side))
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    rows = wave[:, None].expand(-1, side, -1)
    columns = wave[None].expand(side, -1, -1)
    return torch.cat([rows, columns], 2).reshape(side * side, width) * 0.5


def image_features(model: LlavaForConditionalGeneration, pixels: Tensor, shown: Tensor) -> Tensor:
    """Projected features of some patches of uint8 pages, as if the pages had no others.

    Args:
        pixels: [n, size, size, 3].
        shown: the patches, [n, n_shown].

    Returns:
        [n, n_shown, width].
    """
    vision = model.model.vision_tower
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    n, side = len(shown), pixels.shape[1] // CELL
    patches = pixels.view(n, side, CELL, side, CELL, 3).transpose(2, 3).reshape(n, side * side, -1)
    patches = _take(patches, shown).unflatten(2, (-1, 3))
    kernel = vision.embeddings.patch_embedding.weight.permute(0, 2, 3, 1).flatten(1)
    x = F.linear(((patches / 255 - mean) / std).flatten(2), kernel).float()
    x = x + vision.embeddings.position_embedding.weight[1 + shown]
    start = vision.embeddings.class_embedding + vision.embeddings.position_embedding.weight[0]
    x = vision.pre_layrnorm(torch.cat([start.expand(n, 1, -1), x], 1))
    for layer in vision.encoder.layers[:-1]:  # feature layer -2
        attention = layer.self_attn
        h = layer.layer_norm1(x)
        q, k, v = (
            linear(h).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + attention.out_proj(_attend(q, k, v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    return model.model.multi_modal_projector(x[:, 1:])


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [n, len] of x [n, any, width]: [n, len, width]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention in f32: on CPUs its backward pass is faster than that in bf16."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, is_causal=causal)


def _rope(positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin for heads of 32: [n, 1, len, 32] for positions [n, len]."""
    frequency = theta ** (-torch.arange(0, 32, 2) / 32)
    angle = (positions[..., None] * frequency).repeat(1, 1, 2)[:, None]
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class TextRunner:
    """The text model's layers over the image's context and over what follows it.

    The same parameters as model.language_model, run so that training is cheap: what follows the image may
    hold several conversations that do not see one another, and the last layer computes them only.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.text = model.model.language_model
        self.lm_head = model.lm_head
        self.theta = model.config.text_config.rope_parameters["rope_theta"]
        self.eps = model.config.text_config.rms_norm_eps

    def embed(self, tokens: Tensor) -> Tensor:
        return self.text.embed_tokens(tokens)

    def train_logits(
        self, context: Tensor, context_pos: Tensor, tail: Tensor, tail_pos: Tensor, segment: Tensor
    ) -> Tensor:
        """Logits [n, n_tail, vocab] of conversations behind an image.

        Args:
            context: embeddings of prefix and image, [n, n_context, width].
            tail: embeddings behind it, [n, n_tail, width]; positions see their own segment only.
            context_pos, tail_pos, segment: [n, n_context], [n, n_tail], [n, n_tail].
        """
        n = context.shape[1]
        x = torch.cat([context, tail], 1)
        rope = _rope(torch.cat([context_pos, tail_pos], 1), self.theta)
        n_tail = tail.shape[1]
        own = (segment[:, :, None] == segment[:, None]) & torch.ones(n_tail, n_tail, dtype=torch.bool).tril()
        mask = torch.cat([own.new_ones(len(own), n_tail, n), own], 2)[:, None]
        for il, layer in enumerate(self.text.layers):
            q, k, v = self._qkv(layer, x, rope)
            o = _attend(q[:, :, n:], k, v, mask)
            if il == len(self.text.layers) - 1:
                x = x[:, n:]
            else:
                own = _attend(q[:, :, :n], k[:, :, :n], v[:, :, :n], causal=True)
                o = torch.cat([own, o], 2)
            x = self._finish(layer, x, o)
        return self.lm_head(self._norm(self.text.norm, x)).float()

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], norm.weight, self.eps)

    def _qkv(self, layer: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        h = self._norm(layer.input_layernorm, x)
        attention = layer.self_attn
        q, k, v = (
            linear(h).unflatten(2, (-1, 32)).transpose(1, 2)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return _rotate(q, rope), _rotate(k, rope), v

    def _finish(self, layer: nn.Module, x: Tensor, o: Tensor) -> Tensor:
        x = x + layer.self_attn.o_proj(o.transpose(1, 2).flatten(2))
        h = self._norm(layer.post_attention_layernorm, x)
        mlp = layer.mlp
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


# --- batches ------------------------------------------------------------------------------------------


def page_pixels(page: GridPage) -> Tensor:
    return torch.as_tensor(np.array(page.image))


def n_patches(page: GridPage) -> int:
    return (page.image.width // CELL) ** 2


def glyph_patches(page: GridPage) -> list[int]:
    """The patches with a glyph, in reading order."""
    side = page.image.width // CELL
    return [int(c.box[1] // CELL * side + c.box[0] // CELL) for c in page.chunks]


def glyph_labels(pages: list[GridPage]) -> Tensor:
    """What is in the patches: 0 a blank, 1 + i the glyph GLYPHS[i]; [n, n_patches]."""
    labels = torch.zeros(len(pages), n_patches(pages[0]), dtype=torch.long)
    for label, page in zip(labels, pages, strict=True):
        label[glyph_patches(page)] = torch.tensor([1 + GLYPHS.index(chunk.text) for chunk in page.chunks])
    return labels


def choose_patches(glyphs: list[list[int]], n_all: int, blanks: float, rng: np.random.Generator) -> Tensor:
    """Patches to show, ascending: glyphs and a share of the blanks, as many on every page: [n, n_shown]."""
    if blanks >= 1:
        return torch.arange(n_all).expand(len(glyphs), -1)
    n_glyphs = max(map(len, glyphs))
    n = n_glyphs + round(blanks * (n_all - n_glyphs))
    shown = []
    for own in glyphs:
        rest = np.setdiff1d(np.arange(n_all), own)
        shown.append(np.sort([*own, *rng.choice(rest, n - len(own), replace=False)]))
    return torch.as_tensor(np.array(shown, dtype=np.int64))


Conversation = list[tuple[str, str]]  # questions, each with its answer


@dataclass
class Tail:
    """Conversations behind the images, all [n, n_tail].

    Attributes:
        tokens, positions: what is said.
        segment: number of the conversation, -1 behind the last one.
        turn: number of the question within it.
        targets: the token to say next, -100 where the model is not the one who speaks.
        reading: whether the whole page is asked for.
    """

    tokens: Tensor
    positions: Tensor
    segment: Tensor
    turn: Tensor
    targets: Tensor
    reading: Tensor


def make_tail(conversations: list[list[Conversation]], n_image: int) -> Tail:
    """The conversations of every page as tensors; n_image: patches of the image before them."""
    rows = []
    for own in conversations:
        row: list[tuple[int, int, int, int, int, int]] = []
        for segment, conversation in enumerate(own):
            position = len(PREFIX) + n_image
            for turn, (question, answer) in enumerate(conversation):
                before, after = question_tokens(question, turn == 0), [*encode(answer), EOS]
                tokens = before + after
                targets = [-100] * (len(before) - 1) + [*after, -100]
                reading = int(question in READ_PROMPTS)
                row += [
                    (token, position + i, segment, turn, target, reading)
                    for i, (token, target) in enumerate(zip(tokens, targets, strict=True))
                ]
                position += len(tokens)
            row.pop()  # nothing follows the last EOS
        rows.append(row)
    n = max(map(len, rows))
    padded = [row + [(EOS, 0, -1, 0, -100, 0)] * (n - len(row)) for row in rows]
    tail = torch.tensor(padded)
    return Tail(*tail[..., :5].unbind(2), tail[..., 5] > 0)


def draw_conversations(
    page: GridPage, n_lookups: int, most_turns: int, rng: np.random.Generator
) -> list[Conversation]:
    """One reading and several look-ups in any order, dealt out to conversations of 1 to most_turns questions.

    With turns, up to two keys more are looked up than the page has, so that some are asked for again.
    """
    keys = rng.permutation(len(page.lookups))
    if most_turns > 1:
        keys = np.concatenate([keys, rng.integers(0, len(keys), 2)])
    asked = [(READ_PROMPTS[int(rng.random() < 0.25)], page.text)]
    for i in keys[:n_lookups]:
        key, answer = page.lookups[i]
        asked.append((LOOKUP_PROMPTS[int(rng.random() < 0.25)].format(key), answer))
    asked = [asked[i] for i in rng.permutation(len(asked))]
    conversations = []
    while asked:
        n = int(rng.integers(1, most_turns + 1))
        conversations.append(asked[:n])
        asked = asked[n:]
    return conversations


def context_of(runner: TextRunner, features: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and positions of prefix and image features: [n, n_context, width], [n, n_context]."""
    n = len(features)
    prefix = torch.tensor(PREFIX).expand(n, -1)
    context = torch.cat([runner.embed(prefix), features.float()], 1)
    positions = torch.cat([torch.arange(len(PREFIX)).expand(n, -1), len(PREFIX) + shown], 1)
    return context, positions


def dense_pages(
    n: int, density: float, grid: Grid, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages with many more glyphs than a page has, for the vision tower.

    Args:
        n: how many pages.
        grid: the kind of pages.
        density: share of the rows that hold a line.
        rng: what chooses.

    Returns:
        The pages [n, size, size, 3], the patches to show [n, n_shown] and their labels [n, n_shown].
    """
    pixels, labels = [], torch.zeros(n, grid.side**2, dtype=torch.long)
    for label in labels:
        lines = []
        for row in range(grid.side):
            if rng.random() < density:
                length = int(rng.integers(4, grid.side + 1))
                text = "".join(rng.choice([*GLYPHS, *" " * 12], length))
                lines.append(Line(row, int(rng.integers(0, grid.side - length + 1)), text))
                first = row * grid.side + lines[-1].column
                label[first : first + length] = torch.tensor([1 + GLYPHS.find(char) for char in text])
        pixels.append(torch.as_tensor(draw_lines(rng, lines, grid)))
    glyphs = [label.nonzero()[:, 0].tolist() for label in labels]
    shown = choose_patches(glyphs, grid.side**2, 0.03, rng)
    return torch.stack(pixels), shown, labels.gather(1, shown)


def test_conversations(page: GridPage, number: int) -> dict[str, Conversation]:
    """What a held-out page is asked; `number` chooses the keys."""
    read = (READ_PROMPT, page.text)
    keys = [page.lookups[(number + i) % len(page.lookups)] for i in range(4)]
    lookups = [(lookup_prompt(key), answer) for key, answer in keys]
    return {
        "read": [read],
        "look up": lookups,
        "read, look up": [read, *lookups[:2]],
        "look up, read": [*lookups[:2], read],
    }


# --- training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A part of the text model's training.

    Attributes:
        until: the share of the time at which it ends.
        blanks: share of the blank patches that are shown.
        batch: pages a step.
        n_lookups: look-ups a page.
        most_turns: the most questions in a conversation.
    """

    until: float
    blanks: float
    batch: int
    n_lookups: int
    most_turns: int


PHASES = (
    Phase(0.20, 0.0, 24, 4, 1),
    Phase(0.45, 0.1, 24, 5, 6),
    Phase(0.72, 0.3, 20, 6, 6),
    Phase(1.01, 1.0, 16, 8, 6),
)
MORE_PHASES = (Phase(0.35, 0.15, 16, 8, 6), Phase(1.01, 1.0, 16, 8, 6))  # of a model trained on


@dataclass
class Progress:
    """What a checkpoint remembers beside weights and the optimizer's state."""

    stage: str = "vision"
    step: int = 0
    elapsed: float = 0.0  # seconds in this stage, see clock
    n_lines: int = 2  # the most lines that pages have now
    next_seed: int = FIRST_TRAINING_SEED


class Training:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.seed: int = arguments.seed
        self.lr: float = arguments.lr
        self.vision_seconds: float = 0.0 if arguments.start is not None else arguments.vision_minutes * 60
        self.text_seconds: float = arguments.minutes * 60 - self.vision_seconds
        self.bf16 = bf16_is_faster()
        shape = shape_of(arguments)
        self.grid = shape.grid
        self.model = make_model(make_config(shape), self.seed)
        self.runner = TextRunner(self.model)
        self.progress = Progress()
        self.phases = PHASES
        classes = (1 + len(GLYPHS), self.grid.side, self.grid.side, self.grid.n_lines[1])
        self.heads = nn.ModuleList([nn.Linear(shape.width, n) for n in classes])
        self.optimizer = self._vision_optimizer()
        self.checkpoint = self.out / "checkpoint.pt"
        self.stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        if arguments.start is not None:
            self._start_from(arguments.start)
        if self.checkpoint.exists():
            self._load()
        self.log(
            event="start",
            bf16=self.bf16,
            threads=torch.get_num_threads(),
            parameters=sum(p.numel() for p in self.model.parameters()),
            arguments={key: str(value) for key, value in vars(arguments).items()},
        )

    @torch.no_grad()
    def _start_from(self, folder: Path) -> None:
        """Take a trained model, and make the side task's head, which it has not, by discriminant analysis."""
        self.model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(folder).float().state_dict())
        self.phases = MORE_PHASES
        self.progress = Progress(
            "text", n_lines=self.grid.n_lines[1], next_seed=FIRST_TRAINING_SEED * (2 + self.seed)
        )
        self.optimizer = self._text_optimizer()
        rng = self._rng()
        pixels, shown, glyphs = dense_pages(200, 0.5, self.grid, rng)
        features = image_features(self.model, pixels, shown).flatten(0, 1)
        glyphs = glyphs.flatten()
        means = torch.stack([features[glyphs == i].mean(0) for i in range(1 + len(GLYPHS))])
        within = (features - means[glyphs]).T.cov()
        within += 0.1 * within.diagonal().mean() * torch.eye(len(within))
        weight = torch.linalg.solve(within, means.T).T
        self.heads[0].weight.copy_(weight)
        self.heads[0].bias.copy_(-0.5 * (weight * means).sum(1))

    def run(self) -> None:
        if self.progress.stage == "vision":
            self._learn_to_see()
            self._align_text()
            self.progress = Progress(stage="text", next_seed=self.progress.next_seed)
            self.optimizer = self._text_optimizer()
            self._save()
        if self.progress.stage == "text":
            self._learn_to_read()
            self.progress.stage = "done"
            self._save()

    def _stop(self, *_: Any) -> None:
        self.stopped = True

    def log(self, **values: Any) -> None:
        line = json.dumps({"time": time.strftime("%H:%M:%S"), **dataclasses.asdict(self.progress), **values})
        with (self.out / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def _autocast(self) -> Any:
        return torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=self.bf16)

    def _pages(self, n: int, n_lines: int | None) -> list[GridPage]:
        first, self.progress.next_seed = self.progress.next_seed, self.progress.next_seed + n
        rng = np.random.default_rng(first)
        if n_lines is None:
            return [grid_page(first + i, grid=self.grid) for i in range(n)]
        least = max(self.grid.n_lines[0], n_lines - 3)
        return [grid_page(first + i, int(rng.integers(least, n_lines + 1)), self.grid) for i in range(n)]

    def _shown(self, pages: list[GridPage], blanks: float, rng: np.random.Generator) -> Tensor:
        """The patches to show of pages: their glyphs and a share of the blanks, [n, n_shown]."""
        return choose_patches([glyph_patches(page) for page in pages], self.grid.side**2, blanks, rng)

    def _rng(self) -> np.random.Generator:
        """Chance that hangs on how far the training is."""
        return np.random.default_rng(self.progress.next_seed)

    # the first stage

    def _vision_optimizer(self) -> torch.optim.AdamW:
        parts = (self.model.model.vision_tower, self.model.model.multi_modal_projector, self.heads)
        parameters = [p for part in parts for p in part.parameters()]
        return torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def _vision_batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pages of lines [n, size, size, 3]; the patches to show, [n, n_shown]; of each its glyph (0: blank),
        [n, n_shown]; and of glyphs their line, else -100, [n, n_shown]."""
        pages = self._pages(24, None)
        lines = torch.full((len(pages), self.grid.side**2), -100)
        for row, page in zip(lines, pages, strict=True):
            numbers = [i for i, (_, line) in enumerate(page.lookups) for char in line if char != " "]
            row[glyph_patches(page)] = torch.tensor(numbers)
        rng = self._rng()
        blanks = float(rng.choice([0.0, 0.03, 0.1]))
        shown = self._shown(pages, blanks, rng)
        pixels = torch.stack([page_pixels(page) for page in pages])
        return pixels, shown, glyph_labels(pages).gather(1, shown), lines.gather(1, shown)

    def _learn_to_see(self) -> None:
        """Character, row and column of every patch, and of glyphs the number of their line."""
        side = self.grid.side
        rows, columns = torch.arange(side**2) // side, torch.arange(side**2) % side
        progress, last_save = self.progress, time.monotonic()
        while progress.elapsed < self.vision_seconds:
            started = clock()
            share = progress.elapsed / self.vision_seconds
            for group in self.optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (progress.step + 1) / 20) * (0.02 + 0.98 * _cosine(share))
            pixels, shown, glyphs, lines = self._vision_batch()
            pixels_dense, shown_dense, glyphs_dense = dense_pages(24, 0.25, self.grid, self._rng())
            with self._autocast():
                features = image_features(self.model, pixels, shown)
                line = self.heads[3](features).float().flatten(0, 1)
                dense = image_features(self.model, pixels_dense, shown_dense)
                both = torch.cat([features.flatten(0, 1), dense.flatten(0, 1)])
                char, row, column = (head(both).float() for head in self.heads[:3])
            patches = torch.cat([shown.flatten(), shown_dense.flatten()])
            targets = torch.cat([glyphs.flatten(), glyphs_dense.flatten()])
            lines = lines.flatten()
            loss = (
                F.cross_entropy(char, targets)
                + 0.5 * F.cross_entropy(row, rows[patches])
                + 0.5 * F.cross_entropy(column, columns[patches])
                + 0.25 * F.cross_entropy(line, lines)
            )
            self._update(loss)
            progress.step += 1
            progress.elapsed += clock() - started
            if progress.step % 20 == 0:
                self.log(
                    loss=loss.item(),
                    glyphs=_accuracy(char[targets > 0], targets[targets > 0]),
                    rows=_accuracy(row, rows[patches]),
                    columns=_accuracy(column, columns[patches]),
                    lines=_accuracy(line[lines >= 0], lines[lines >= 0]),
                )
            if self.stopped or time.monotonic() - last_save > 120:
                self._save()
                if self.stopped:
                    raise SystemExit("stopped: the checkpoint is saved")
                last_save = time.monotonic()

    @torch.no_grad()
    def _align_text(self) -> None:
        """Image features as large as text wants them, and characters that look like their glyphs."""
        pixels, shown, glyphs, _ = self._vision_batch()
        features = image_features(self.model, pixels, shown)
        scale = 0.4 / features.square().mean().sqrt()
        projector = self.model.model.multi_modal_projector.linear_2
        projector.weight.mul_(scale)
        projector.bias.mul_(scale)
        means = torch.stack([features[glyphs == i + 1].mean(0) for i in range(len(GLYPHS))]) * scale
        self.heads[0].weight.div_(scale)
        ids = [ID[char] for char in GLYPHS]
        self.runner.text.embed_tokens.weight[ids] = means
        rows = means - means.mean(0)
        self.model.lm_head.weight[ids] = rows * (0.06 / rows.square().mean().sqrt())

    # the second stage

    def _text_optimizer(self) -> torch.optim.AdamW:
        groups: dict[bool, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            groups.setdefault(parameter.ndim > 1 and "embed" not in name, []).append(parameter)
        groups[False] += self.heads[0].parameters()
        return torch.optim.AdamW(
            [{"params": parameters, "weight_decay": 0.05 * decay} for decay, parameters in groups.items()],
            betas=(0.9, 0.98),
            fused=True,
        )

    def _learn_to_read(self) -> None:
        progress = self.progress
        last_save = last_evaluation = time.monotonic()
        reading = looking_up = 0.0  # running accuracy per token
        sums: dict[str, list[float]] = {}
        while progress.elapsed < self.text_seconds:
            started = clock()
            share = progress.elapsed / self.text_seconds
            phase = next(phase for phase in self.phases if share < phase.until)
            lr = self.lr * min(1, (progress.step + 1) / 50) * (0.02 + 0.98 * _cosine(share))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            most_lines = self.grid.n_lines[1]
            pages = self._pages(phase.batch, None if progress.n_lines == most_lines else progress.n_lines)
            rng = self._rng()
            tail = make_tail(
                [draw_conversations(page, phase.n_lookups, phase.most_turns, rng) for page in pages],
                self.grid.side**2,
            )
            shown = self._shown(pages, phase.blanks, rng)
            with self._autocast():
                pixels = torch.stack([page_pixels(page) for page in pages])
                features = image_features(self.model, pixels, shown)
                context, positions = context_of(self.runner, features, shown)
                logits = self.runner.train_logits(
                    context, positions, self.runner.embed(tail.tokens), tail.positions, tail.segment
                )
                # the vision tower goes on learning what a glyph is, on pages that are full of them
                pixels, shown_dense, glyphs_dense = dense_pages(24, 0.5, self.grid, rng)
                dense = image_features(self.model, pixels, shown_dense)
                glyph = self.heads[0](torch.cat([features.flatten(0, 1), dense.flatten(0, 1)])).float()
            asked = tail.targets >= 0
            glyphs = torch.cat([glyph_labels(pages).gather(1, shown).flatten(), glyphs_dense.flatten()])
            loss = F.cross_entropy(logits[asked], tail.targets[asked])
            loss = loss + 0.5 * F.cross_entropy(glyph, glyphs)
            norm = self._update(loss)
            right = logits.argmax(2) == tail.targets
            scores = {
                "loss": loss.item(),
                "reading": right[asked & tail.reading].float().mean().item(),
                "looking_up": right[asked & ~tail.reading].float().mean().item(),
                "norm": norm,
                "glyphs": _accuracy(glyph[glyphs > 0], glyphs[glyphs > 0]),
            }
            progress.step += 1
            seconds = clock() - started
            progress.elapsed += seconds
            reading += 0.05 * (scores["reading"] - reading)
            looking_up += 0.05 * (scores["looking_up"] - looking_up)
            if min(reading, looking_up) > 0.8 and progress.n_lines < most_lines:
                progress.n_lines += 1
                reading = looking_up = 0.7
            for key, value in {**scores, "seconds": seconds}.items():
                sums.setdefault(key, []).append(value)
            if progress.step % 20 == 0:
                means = {key: round(float(np.mean(values)), 4) for key, values in sums.items()}
                self.log(
                    lr=lr, blanks=phase.blanks, n_shown=shown.shape[1], n_tail=tail.tokens.shape[1], **means
                )
                sums.clear()
            if self.stopped or time.monotonic() - last_save > 120:
                self._save()
                if self.stopped:
                    raise SystemExit("stopped: the checkpoint is saved")
                last_save = time.monotonic()
            if time.monotonic() - last_evaluation > 300:
                began = clock()
                self.log(event="evaluation", **self.evaluate(64, phase.blanks))
                last_evaluation = time.monotonic()
                progress.elapsed += clock() - began  # the time goes on

    def _update(self, loss: Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        return float(norm)

    @torch.no_grad()
    def evaluate(self, n_pages: int, blanks: float) -> dict[str, float]:
        """Shares of answers to the first held-out pages that are right to the last token, by place in a
        conversation. The answers before are the true ones, so that no token needs a step of its own."""
        right: dict[str, list[bool]] = {}
        characters: list[float] = []
        for first in range(0, n_pages, 16):
            seeds = range(first, min(first + 16, n_pages))
            pages = [grid_page(seed, grid=self.grid) for seed in seeds]
            asked = [test_conversations(page, seed) for page, seed in zip(pages, seeds, strict=True)]
            tail = make_tail([list(own.values()) for own in asked], self.grid.side**2)
            shown = self._shown(pages, blanks, np.random.default_rng(first))
            with self._autocast():
                pixels = torch.stack([page_pixels(page) for page in pages])
                context, positions = context_of(self.runner, image_features(self.model, pixels, shown), shown)
                logits = self.runner.train_logits(
                    context, positions, self.runner.embed(tail.tokens), tail.positions, tail.segment
                )
            hit = (logits.argmax(2) == tail.targets) | (tail.targets < 0)
            for row, conversations in enumerate(asked):
                read = (tail.segment[row] == 0) & (tail.targets[row] >= 0)
                characters.append(hit[row][read].float().mean().item())
                for number, (name, turns) in enumerate(conversations.items()):
                    for turn in range(len(turns)):
                        own = (tail.segment[row] == number) & (tail.turn[row] == turn)
                        right.setdefault(f"{name} {turn + 1}", []).append(bool(hit[row][own].all()))
        return {
            "characters": round(float(np.mean(characters)), 4),
            **{name: round(float(np.mean(values)), 4) for name, values in right.items()},
        }

    def _save(self) -> None:
        with atomic_path(self.checkpoint) as path:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "heads": self.heads.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "progress": dataclasses.asdict(self.progress),
                },
                path,
            )

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=torch.get_default_device())
        self.progress = Progress(**state["progress"])
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        if self.progress.stage != "vision":
            self.optimizer = self._text_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])


def shape_of(arguments: argparse.Namespace) -> Shape:
    return Shape(GRIDS[arguments.grid], arguments.layers, arguments.heads, arguments.width)


def export(checkpoint: Path, folder: Path, shape: Shape) -> None:
    """Write the checkpoint's model as a Hugging Face folder in f16, with processor and tokenizer."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    config = make_config(shape)
    model = make_model(config, seed=0)
    model.load_state_dict(torch.load(checkpoint, map_location="cpu")["model"])
    model.generation_config.eos_token_id = EOS
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    size = shape.grid.size
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=save_tokenizer(folder),
        patch_size=CELL,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    patch_tokenizer_config(folder)


def bf16_is_faster() -> bool:
    """Whether this processor multiplies bf16 matrices faster than f32: some emulate it."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(10):
            product = a @ b
        product.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return seconds[1] < seconds[0]


def evaluate_checkpoint(folder: Path, grid: Grid, n_pages: int) -> dict[str, float]:
    """Shares of right answers to the first held-out pages, by place in a conversation; transformers generates
    them greedily, and its own answers stand before the next question."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def answers(messages: list[list[dict[str, Any]]], pages: list[GridPage], n: int) -> list[str]:
        prompts = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(
            text=prompts, images=[page.image for page in pages], padding=True, return_tensors="pt"
        )
        said = model.generate(**inputs, max_new_tokens=n, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return list(processor.batch_decode(said, skip_special_tokens=True))

    scores: dict[str, list[float]] = {"characters": []}
    for first in range(0, n_pages, 10):
        seeds = range(first, min(first + 10, n_pages))
        pages = [grid_page(seed, grid=grid) for seed in seeds]
        asked = [test_conversations(page, seed) for page, seed in zip(pages, seeds, strict=True)]
        for name in asked[0]:
            messages: list[list[dict[str, Any]]] = [[] for _ in pages]
            for turn in range(len(asked[0][name])):
                questions, expected = zip(*(own[name][turn] for own in asked), strict=True)
                for own, question in zip(messages, questions, strict=True):
                    image = [{"type": "image"}] if turn == 0 else []
                    own.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
                said = answers(messages, pages, 96 if questions[0] == READ_PROMPT else 16)
                for own, answer in zip(messages, said, strict=True):
                    own.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
                right = [a == b for a, b in zip(said, expected, strict=True)]
                scores.setdefault(f"{name} {turn + 1}", []).extend(right)
                if name == "read":
                    scores["characters"] += [
                        character_accuracy(a, [b]) for a, b in zip(said, expected, strict=True)
                    ]
    return {name: float(np.mean(values)) for name, values in scores.items()}


def clock() -> float:
    """Seconds of processor time a thread: other work on the machine delays a training but does not cut it."""
    return time.process_time() / torch.get_num_threads()


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(share, 1)))


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return round((logits.argmax(1) == labels).float().mean().item(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--grid", choices=list(GRIDS), default="grid", help="the pages")
    parser.add_argument("--layers", type=int, default=6, help="of the text model")
    parser.add_argument("--heads", type=int, default=16, help="of the text model, a layer")
    parser.add_argument("--width", type=int, default=256, help="of the text model")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train")
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--from", dest="start", type=Path, metavar="HF_DIR", help="train this model on")
    train.add_argument("--minutes", type=float, default=90.0, help="both stages together")
    train.add_argument("--vision-minutes", type=float, default=6.0)
    train.add_argument("--lr", type=float, default=8e-4)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, default=os.cpu_count())
    write = commands.add_parser("export")
    write.add_argument("--out", type=Path, required=True, help="the folder that was trained in")
    write.add_argument("folder", type=Path, metavar="HF_DIR")
    test = commands.add_parser("evaluate")
    test.add_argument("folder", type=Path, metavar="HF_DIR")
    test.add_argument("--pages", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.command == "export":
        export(arguments.out / "checkpoint.pt", arguments.folder, shape_of(arguments))
    elif arguments.command == "evaluate":
        figures = evaluate_checkpoint(arguments.folder, GRIDS[arguments.grid], arguments.pages)
        print(json.dumps(figures, indent=2))
    else:
        torch.set_num_threads(arguments.threads)
        if torch.cuda.is_available():
            torch.set_default_device("cuda")
        Training(arguments).run()


if __name__ == "__main__":
    main()
