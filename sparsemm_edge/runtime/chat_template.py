"""Chat templates: messages with images in, prompt text with image markers out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sparsemm_edge.errors import SparseMMError, one_line
from sparsemm_edge.files import check_text, parse_json, read_text
from sparsemm_edge.runtime import builtin_templates

# What the templates of LLaVA- and Qwen-VL-like models write for an image. llama.cpp's mtmd puts the model's
# begin and end tokens around an image by itself, so these go as a whole.
IMAGE_TOKENS = ("<|vision_start|><|image_pad|><|vision_end|>", "<image>")

# What stands for a text while a template is rendered. Lists, as Python or as JSON, write such quotes
# otherwise, so that text which comes back as it was is no list's; and no template puts tabs around a message
# by itself, so that those tell whether it strips what it is given.
_STAND_IN = """text-{}-"it's"-sparsemm-edge"""
_SPACE = "\t"


class _Generation(Extension):
    """Hugging Face's `{% generation %}` blocks mark the reply for training; here they are plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Parts(list[dict[str, str]]):
    """The parts of a message. Printing it raises, so that a template for plain text does not print a list."""

    def __str__(self) -> str:
        raise TemplateError("it takes a message's text, not a list of its parts")

    __repr__ = __str__


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: system, user or assistant.
        text: may be empty.
        n_images: images before the text.
    """

    role: str
    text: str
    n_images: int = 0


def read_template(given: str) -> str:
    """Resolve --chat-template: jinja text, the name of a llama.cpp template, or a file of jinja text.

    Raises:
        SparseMMError: the file cannot be read, or the text is not text.
    """
    if "{" not in given and given not in builtin_templates.names():
        try:
            return read_text(Path(given))
        except SparseMMError as error:
            raise SparseMMError(
                f"{error}; nor is it one of llama.cpp's templates: --chat-template"
                f" {'|'.join(builtin_templates.names())}"
            ) from error
    check_text(given, "the chat template")
    return given


def read_template_options(given: str) -> dict[str, Any]:
    """Parse extra template variables, a JSON object such as {"enable_thinking": false}.

    Raises:
        SparseMMError: not a JSON object, or it sets a variable that the program sets.
    """
    found = parse_json(given, "--chat-template-kwargs", 'a JSON object such as {"enable_thinking": false}')
    if not isinstance(found, dict):
        raise SparseMMError(f"--chat-template-kwargs is {given}: expected a JSON object")
    if own := _OWN.intersection(found):
        raise SparseMMError(f"--chat-template-kwargs cannot say {sorted(own)[0]}: the program says it")
    return found


def render_turns(
    template: str,
    turns: Sequence[Turn],
    *,
    marker: str,
    bos: str,
    eos: str,
    first: bool = True,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Render messages, with a marker for each image, up to the start of the reply.

    Later turns begin with what the template writes at the end of a reply. Earlier turns are not part of the
    text: they are in the KV cache.

    A message is passed as a list of parts (images, then text) if the template accepts one, as Hugging Face
    processors do, so that the template decides what separates image and text. A template that accepts only
    text, or that writes an image token which is not in IMAGE_TOKENS, gets the markers as lines before the
    prompt. If it has no place for a system message, that goes to the start of the first message.

    Args:
        template: jinja text, or the name of one of llama.cpp's templates.
        turns: a system message or none, then user and assistant.
        marker: text that marks an image in the result.
        bos, eos: the model's begin and end tokens, as text.
        first: whether the turns begin the conversation, or follow a reply.
        options: extra variables for the template.

    Raises:
        SparseMMError: the template is broken, or drops a text or the images.
    """
    if any(marker in turn.text for turn in turns):
        raise SparseMMError(f"the prompt holds {marker}, which stands for an image")
    write = _writer(template, bos, eos, options or {})
    try:
        return _filled(write, turns, marker, first)
    except SparseMMError:
        if len(turns) < 2 or (turns[0].role, turns[1].role) != ("system", "user"):
            raise
        message = replace(turns[1], text=f"{turns[0].text}\n\n{turns[1].text}")
        return _filled(write, [message, *turns[2:]], marker, first)


_Writer = Callable[[list[dict[str, Any]]], str]
_OWN = frozenset(("messages", "add_generation_prompt", "bos_token", "eos_token"))


def _writer(template: str, bos: str, eos: str, options: Mapping[str, Any]) -> _Writer:
    """The function that renders messages."""
    if template in builtin_templates.names():
        if options:
            raise SparseMMError(f"llama.cpp's template {template} takes no --chat-template-kwargs")
        return partial(builtin_templates.apply, template)
    compiled = _compiled(template)
    return lambda messages: compiled.render(
        **options, messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
    )


def _filled(write: _Writer, turns: Sequence[Turn], marker: str, first: bool) -> str:
    """Render with the first message format that the template accepts.

    Texts are rendered as placeholders, so that no text is taken for template syntax or image tokens.
    """
    shown = list(turns) if first else [Turn("user", ""), Turn("assistant", ""), *turns]
    stand_ins = [_STAND_IN.format(index) for index in range(len(shown))]
    needed = stand_ins if first else stand_ins[1:]
    n_images = sum(turn.n_images for turn in turns)
    roles = dict.fromkeys(turn.role for turn in shown)
    problem: Exception | str = "it leaves out the question or its images"
    for shapes in product(*(_SHAPES[role] for role in roles)):
        shape = dict(zip(roles, shapes, strict=True))

        def rendered(space: str, shape: Mapping[str, _Shape] = shape) -> str:
            texts = [space + stand_in + space for stand_in in stand_ins]
            return write(
                [
                    {"role": turn.role, "content": shape[turn.role](text, turn.n_images, marker)}
                    for turn, text in zip(shown, texts, strict=True)
                ]
            )

        try:
            text, spaced = rendered(""), rendered(_SPACE)
        except Exception as error:  # a template is a program: it may fail in every way there is
            problem = error
            continue
        between = _between(text, needed)
        if between is None:
            continue
        if not first:
            between = between[1:]
        if shape["user"] is _typed:
            between = _mark_images(between, n_images, marker)
        if sum(part.count(marker) for part in between) == n_images:
            prompt = between[0]
            for turn, stand_in, after in zip(turns, stand_ins[-len(turns) :], between[1:], strict=True):
                strips = _SPACE + stand_in + _SPACE not in spaced
                prompt += (turn.text.strip() if strips else turn.text) + after
            return prompt
    raise _unusable(problem)


def _between(text: str, stand_ins: Sequence[str]) -> list[str] | None:
    """The text around the placeholders; None if one is missing."""
    between = []
    for stand_in in reversed(stand_ins):
        text, found, after = text.rpartition(stand_in)
        if not found:
            return None
        between.append(after)
    return [text, *reversed(between)]


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals.update(
        raise_exception=_raise, strftime_now=lambda wanted: datetime.now().strftime(wanted)
    )
    try:
        return environment.from_string(template)
    except Exception as error:  # whatever jinja stumbles over in it
        raise _unusable(error) from error


_Shape = Callable[[str, int, str], Any]


def _typed(text: str, n_images: int, marker: str) -> Any:
    return _Parts([*[{"type": "image"}] * n_images, {"type": "text", "text": text}])


def _plain(text: str, n_images: int, marker: str) -> Any:
    return f"{marker}\n" * n_images + text


def _typed_lines(text: str, n_images: int, marker: str) -> Any:
    return _typed(_plain(text, n_images, marker), 0, marker)


# the shapes of a message that a template may take, the first that works counts
_SHAPES: dict[str, tuple[_Shape, ...]] = {
    "user": (_typed, _plain, _typed_lines),
    "assistant": (_typed, _plain),
    "system": (_typed, _plain),
}


def _mark_images(between: list[str], n_images: int, marker: str) -> list[str]:
    """Put markers in place of the template's image tokens."""
    for token in IMAGE_TOKENS:
        if n_images and sum(part.count(token) for part in between) == n_images:
            return [part.replace(token, marker) for part in between]
    return between


def _unusable(problem: Exception | str) -> SparseMMError:
    return SparseMMError(
        f"the chat template cannot be used ({one_line(problem)}); give another: --chat-template"
    )


def _raise(message: str) -> None:
    raise TemplateError(message)
