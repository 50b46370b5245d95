"""The demo model's tokens: characters, bytes for all others, and the words that its questions are made of.

Words are whole tokens so that a question is short: an eviction's observation window of 8 or 16 positions
then holds the key that is asked for.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = [
    "USER:",
    " ASSISTANT:",
    "Read",
    " the",
    " page",
    "What",
    " does",
    " say",
    " is",
    "Look",
    " up",
]
CHARACTERS = [*map(chr, range(0x20, 0x7F)), "\n"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS]
VOCAB = [*PIECES, *WORDS, "<image>", "<pad>"]
ID = {token: i for i, token in enumerate(VOCAB)}
UNK, BOS, EOS, IMAGE, PAD = (ID[token] for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>"))

# LLaVA-1.5's form; the answer follows the colon directly
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ ' ASSISTANT:' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

_TOKEN = re.compile("|".join(map(re.escape, sorted(WORDS, key=len, reverse=True))) + "|.", re.DOTALL)


def encode(text: str) -> list[int]:
    """Tokens of a text of known characters, without a begin token."""
    return [ID[token] for token in _TOKEN.findall(text)]


def decode(tokens: list[int]) -> str:
    return "".join(VOCAB[token] for token in tokens)


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write tokenizer.model, which llama.cpp's converter reads; and make the tokenizer of transformers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    _save_sentencepiece(folder / "tokenizer.model")
    pieces = {piece.replace(" ", "▁"): i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(VOCAB[i], normalized=False) for i in (UNK, BOS, EOS)])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    tokenizer.add_special_tokens([AddedToken(VOCAB[i], normalized=False) for i in (IMAGE, PAD)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def patch_tokenizer_config(folder: Path) -> None:
    """State in tokenizer_config.json what transformers 5 no longer writes but llama.cpp's converter reads."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    plain = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    special = {UNK, BOS, EOS, IMAGE, PAD}
    config.update(
        add_bos_token=True,
        add_prefix_space=False,
        added_tokens_decoder={
            str(i): {"content": VOCAB[i], "special": i in special, **plain}
            for i in sorted({*special, *(ID[word] for word in WORDS)})
        },
        chat_template=CHAT_TEMPLATE,
    )
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_sentencepiece(path: Path) -> None:
    """A SentencePiece model of the pieces: no merges, no normalisation, no space in front."""
    spm: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    kinds = spm.ModelProto.SentencePiece
    model = spm.ModelProto()
    for i, text in enumerate(PIECES):
        piece = model.pieces.add()
        piece.piece = "▁" if text == " " else text
        if i in (BOS, EOS):
            piece.type = kinds.CONTROL
        elif i == UNK:
            piece.type = kinds.UNKNOWN
        else:
            piece.type = kinds.BYTE if len(text) > 1 else kinds.NORMAL
        piece.score = -float(i) if piece.type == kinds.NORMAL else 0.0
    model.trainer_spec.model_type = spm.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(PIECES)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    path.write_bytes(model.SerializeToString())
