"""Options shared by several commands, and groups of them.

A command takes a group as one parameter, which as_command expands into options:

    def generate(loaded: options.ModelOptions, n_predict: ... = 256) -> None:
        with loaded.load() as model: ...
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsemm_edge.defaults import IMAGE_CACHE_SIZE, N_CTX, RANGES
from sparsemm_edge.errors import SparseMMError, check_within
from sparsemm_edge.files import check_text, decode_text, read_text

if TYPE_CHECKING:
    from sparsemm_edge.runtime import Eviction, Loading, Sampling, VisionModel

Mmproj = Annotated[Path | None, typer.Option(help="Image encoder (mmproj), a GGUF file.")]
Images = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Image file or URL; may be given several times."),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="Chat template: a llama.cpp name, jinja text or a file of it [default: the model's]."),
]

# How llama.cpp runs.
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="Threads [default: the physical cores].")
]
ThreadsBatch = Annotated[
    int | None, typer.Option("--threads-batch", "-tb", help="Threads for prompts [default: --threads].")
]
NGpuLayers = Annotated[
    int | None,
    typer.Option(
        "--n-gpu-layers", "-ngl", help="Layers on the GPU, if llama.cpp has one; -1: all [default: all]."
    ),
]
Seed = Annotated[int, typer.Option("--seed", "-s", help="Seed for sampling; -1: a new one each time.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show llama.cpp's log.")]
ImageMemory = Annotated[
    int, typer.Option(help="MiB of encoded images to keep in memory, for images that come again.")
]
ImageMinTokens = Annotated[
    int | None,
    typer.Option(help="Fewest tokens of an image, for models with dynamic resolution (Qwen-VL)."),
]
ImageMaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an image, likewise.")]
NUbatch = Annotated[
    int | None,
    typer.Option("--n-ubatch", "-ub", help="Prompt tokens computed at a time [default: 512]."),
]

# Eviction; the defaults are the model file's.
Budget = Annotated[int | None, typer.Option(help="Mean positions per KV head [default: the file's].")]
Policy = Annotated[
    str | None, typer.Option(help="sparsemm, uniform, pyramid, random or full [default: the file's].")
]
Window = Annotated[
    int | None,
    typer.Option(
        help="Observation window: last prompt positions, which are always kept [default: the file's]."
    ),
]
Scores = Annotated[Path | None, typer.Option(help="Head scores, a JSON file [default: the model file's].")]
Vote = Annotated[
    str | None,
    typer.Option(help="How positions are ranked: mixkv or snapkv [default: the file's]."),
]
Residual = Annotated[
    bool | None,
    typer.Option(help="Keep a residual slot per head that summarises what it evicted [default: the file's]."),
]
KvMaxTail = Annotated[
    int | None,
    typer.Option(help="Most generated positions per KV head; the oldest are dropped [default: all]."),
]

NCtxOfChat = Annotated[
    int | None,
    typer.Option(
        "--n-ctx",
        "-c",
        help=f"Most positions of a conversation [default: {N_CTX}, or what the model was trained for if that"
        " is less].",
    ),
]

# Pages to read.
PageSize = Annotated[str, typer.Option("--page-size", help="Of documents, in pixels.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Most tokens of an answer [default: a little over the page's text].")
]

# What is written.
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file to write if it exists.")]


def _alike(options: Any, kind: Any) -> dict[str, Any]:
    """The options that a dataclass has fields of the same name for."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in vars(options).items() if name in names}


@dataclass(frozen=True)
class ModelOptions:
    """The model and how it is loaded."""

    model: Annotated[Path, typer.Option("--model", "-m", help="Text model, a GGUF file.")]
    mmproj: Mmproj = None
    threads: Threads = None
    threads_batch: ThreadsBatch = None
    n_gpu_layers: NGpuLayers = None
    mmproj_offload: Annotated[bool, typer.Option(help="Run the image encoder on the GPU, or not.")] = True
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="LoRA adapter over the text model, FILE or FILE=SCALE; may be given several times.",
        ),
    ] = None
    image_min_tokens: ImageMinTokens = None
    image_max_tokens: ImageMaxTokens = None
    mmap: Annotated[bool, typer.Option(help="Memory-map the model file, or read it.")] = True
    mlock: Annotated[
        bool, typer.Option("--mlock", help="Lock the weights in memory, if the system allows it.")
    ] = False
    unload_mmproj: Annotated[
        bool,
        typer.Option(
            "--unload-mmproj",
            help="Free the image encoder before the prompt is computed; reload it for the next image.",
        ),
    ] = False

    def loading(self, *, image_memory: int = 0, kept: "ImageCacheOptions | None" = None) -> "Loading":
        from sparsemm_edge.runtime.loading import Loading, Lora

        return Loading(
            n_threads_batch=self.threads_batch,
            loras=tuple(map(Lora.parse, self.lora or ())),
            image_memory=image_memory,
            **({} if kept is None else kept.arguments()),
            **_alike(self, Loading),
        )

    def load(
        self, *, show_log: bool = False, image_memory: int = 0, kept: "ImageCacheOptions | None" = None
    ) -> "VisionModel":
        from sparsemm_edge.runtime import VisionModel

        return VisionModel.load(
            self.model,
            self.mmproj,
            n_threads=self.threads,
            show_log=show_log,
            loading=self.loading(image_memory=image_memory, kept=kept),
        )


@dataclass(frozen=True)
class ImageCacheOptions:
    """The image cache on disk."""

    image_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep encoded images in this folder, for images that come again.",
        ),
    ] = None
    image_cache_size: Annotated[
        int, typer.Option(help="Size limit of that folder in MiB; the least recently used files are removed.")
    ] = IMAGE_CACHE_SIZE

    def arguments(self) -> dict[str, Any]:
        """Arguments of Loading."""
        folder = self.image_cache
        if folder is not None and folder.name.isdecimal() and not folder.exists():
            raise SparseMMError(
                f"--image-cache is {folder}: expected a folder; the MiB of images kept in memory are set with"
                " --image-memory"
            )
        return {
            "image_cache": None if folder is None else str(folder),
            "image_cache_size": self.image_cache_size,
        }


@dataclass(frozen=True)
class CacheOptions:
    """Batch size of prompts and data types of the cache."""

    n_ubatch: NUbatch = None
    cache_type_k: Annotated[
        str, typer.Option("--cache-type-k", "-ctk", help="Data type of K: f16, f32, bf16, q8_0 or q4_0.")
    ] = "f16"
    cache_type_v: Annotated[
        str, typer.Option("--cache-type-v", "-ctv", help="Data type of V: f16, f32, bf16, q8_0 or q4_0.")
    ] = "f16"


@dataclass(frozen=True)
class QuestionOptions:
    """The prompt."""

    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt; - reads it from stdin.")
    ] = None
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a text file.")] = (
        None
    )

    def text(self, default: str | None = None) -> str:
        """The prompt, without a final line end from a file or pipe."""
        if self.prompt is not None and self.file is not None:
            raise SparseMMError("give the prompt with -p or with -f, not both")
        if self.file is not None:
            return _without_last_line_end(read_text(self.file))
        if self.prompt == "-":
            return _without_last_line_end(decode_text(sys.stdin.buffer.read(), "the prompt on stdin"))
        found = default if self.prompt is None else self.prompt
        if found is None:
            raise SparseMMError("no prompt: give -p TEXT, -p - to read stdin, or -f FILE")
        check_text(found, "the prompt")
        return found


@dataclass(frozen=True)
class TemplateOptions:
    """System message and chat template."""

    system: Annotated[str | None, typer.Option(help="System message: text, or @FILE.")] = None
    chat_template: ChatTemplate = None
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(help="Extra variables for the template, such as '{\"enable_thinking\": false}'."),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of generate() and others."""
        from sparsemm_edge.runtime.chat_template import read_template_options

        system, options = self.system, self.chat_template_kwargs
        if system is not None and system.startswith("@"):
            system = _without_last_line_end(read_text(Path(system[1:])))
        elif system is not None:
            check_text(system, "--system")
        return {
            "system": system,
            "chat_template": template_text(self.chat_template),
            "template_options": None if options is None else read_template_options(options),
        }


def template_text(given: str | None) -> str | None:
    """The text of --chat-template; None: the model's own template."""
    if given is None:
        return None
    from sparsemm_edge.runtime.chat_template import read_template

    return read_template(given)


@dataclass(frozen=True)
class EvictionOptions:
    """Eviction."""

    budget: Budget = None
    policy: Policy = None
    window: Window = None
    scores: Scores = None
    vote: Vote = None
    residual: Residual = None
    kv_max_tail: KvMaxTail = None
    evict: Annotated[bool, typer.Option(help="Evict, or keep the full cache.")] = True

    def eviction(self) -> "Eviction":
        from sparsemm_edge.runtime import Eviction

        return Eviction(self.evict, max_tail=self.kv_max_tail, **_alike(self, Eviction))


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling, stop texts and grammar. The defaults are those of runtime.Sampling."""

    temp: Annotated[float, typer.Option(help="Temperature; 0 is greedy.")] = 0.0
    seed: Seed = 0
    top_k: Annotated[int, typer.Option(help="Sample from this many most likely tokens; 0: all.")] = 40
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens with this total probability.")
    ] = 0.95
    min_p: Annotated[
        float, typer.Option(help="Sample from tokens with at least this share of the top probability.")
    ] = 0.05
    repeat_penalty: Annotated[
        float, typer.Option(help="Divide the logits of the last 64 tokens by this; 1: off.")
    ] = 1.0
    presence_penalty: Annotated[
        float, typer.Option(help="Subtract this from the logits of the last 64 tokens.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, typer.Option(help="Subtract this once per occurrence in the last 64 tokens.")
    ] = 0.0
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Stop before this text; may be given several times."),
    ] = None
    json_schema: Annotated[
        str | None, typer.Option(help="JSON schema of the answer: the text or a file.")
    ] = None
    grammar_file: Annotated[Path | None, typer.Option(help="Grammar of the answer, a GBNF file.")] = None

    def sampling(self) -> "Sampling":
        from sparsemm_edge.runtime import Sampling

        schema = self.json_schema
        if schema is not None and not schema.lstrip().startswith("{"):
            schema = read_text(Path(schema))
        other = {
            "temperature": self.temp,
            "stop": tuple(self.stop or ()),
            "grammar": None if self.grammar_file is None else read_text(self.grammar_file),
            "json_schema": schema,
        }
        return Sampling(**_alike(self, Sampling) | other)


@dataclass(frozen=True)
class ConversationOptions(ImageCacheOptions, CacheOptions, EvictionOptions):
    """The cache of a conversation, and what is kept of images on disk."""

    reuse_evicted: Annotated[
        bool,
        typer.Option(
            "--reuse-evicted",
            help="Evict the first message's images before its text is read, and keep the cache in"
            " --image-cache: asked about again, they are not read again. No question votes on what is kept.",
        ),
    ] = False

    def conversation(self) -> dict[str, Any]:
        """Arguments of Conversation."""
        evicts = {"eviction": self.eviction(), "reuse_evicted": self.reuse_evicted}
        return _alike(self, CacheOptions) | evicts


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """A command for typer: its groups become their options, and numbers outside RANGES are refused.

    A group is a parameter whose type is a dataclass of options.
    """
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            shown += inspect.signature(groups[name]).parameters.values()
        else:
            shown.append(parameter)

    @functools.wraps(function)
    def run(**given: Any) -> None:
        for name, value in given.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_within(f"--{name.replace('_', '-')}", value, *RANGES[name])
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        function(**given)

    # a parameter without a default may follow one with a default here: all are given by name
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
    run.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def _without_last_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
