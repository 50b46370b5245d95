"""Options that several commands have, each with one name and one help text."""

from pathlib import Path
from typing import Annotated

import typer

_MMPROJ = "Its image encoder, a GGUF file."

Model = Annotated[Path, typer.Option("--model", "-m", help="The text model, a GGUF file.")]
Mmproj = Annotated[Path, typer.Option(help=_MMPROJ)]
OptionalMmproj = Annotated[Path | None, typer.Option(help=_MMPROJ)]
Images = Annotated[
    list[Path] | None, typer.Option(help="Image that the question is about; may be given several times.")
]

# How an answer is sampled.
Temperature = Annotated[float, typer.Option(help="0: the likeliest token; above: sample.")]
SamplingSeed = Annotated[int, typer.Option(help="Seed for sampling.")]
ChatTemplate = Annotated[
    str | None, typer.Option(help="Jinja text or file to use instead of the model's chat template.")
]

# How llama.cpp runs.
Threads = Annotated[int | None, typer.Option(help="Threads [default: the physical cores].")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show llama.cpp's log.")]
CacheTypeK = Annotated[str, typer.Option(help="Numbers of K: f16, f32, bf16, q8_0 or q4_0.")]
CacheTypeV = Annotated[str, typer.Option(help="Numbers of V: f16, f32, bf16, q8_0 or q4_0.")]
NUbatchCompared = Annotated[
    int | None,
    typer.Option(help="Prompt tokens computed at a time [default: 512; evicted: the whole prompt]."),
]

# How it evicts; what is not given is the model file's.
Budget = Annotated[
    int | None, typer.Option(help="Positions a KV head keeps on average, instead of the file's budget.")
]
Policy = Annotated[
    str | None, typer.Option(help="sparsemm, uniform, pyramid, random or full, instead of the file's.")
]
Window = Annotated[
    int | None, typer.Option(help="Last prompt positions, which vote and are kept, instead of the file's.")
]
Scores = Annotated[Path | None, typer.Option(help="Head scores to use instead of the file's, a JSON file.")]
Vote = Annotated[
    str | None,
    typer.Option(help="How a head's positions are ranked: mixkv or snapkv, instead of the file's."),
]
Residual = Annotated[
    bool | None,
    typer.Option(
        "--residual/--no-residual",
        help="One place of a head that evicts stands for all that it lost [default: the file's].",
        show_default=False,
    ),
]
KvMaxTail = Annotated[
    int | None,
    typer.Option(help="Generated positions a KV head holds at most, the oldest go first [default: all]."),
]
Evict = Annotated[bool, typer.Option("--evict/--no-evict", help="Evict, or keep the whole cache.")]

# What is written.
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file to write if it exists.")]
