"""A model's own chat template: a user message with images in, prompt text with image markers out."""

from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import check_text, read_text

# What the templates of LLaVA- and Qwen-VL-like models write for an image. llama.cpp's mtmd puts the model's
# begin and end tokens around an image by itself, so these go as a whole.
IMAGE_TOKENS = ("<|vision_start|><|image_pad|><|vision_end|>", "<image>")

# What stands for the question and for the reply before it while a template is rendered. Lists, as Python or
# as JSON, write such quotes otherwise, so that text which comes back as it was is no list's; and no template
# puts tabs around a message by itself, so that those tell whether it strips what it is given.
_QUESTION = """question-"it's"-sparsemm-edge"""
_REPLY = """reply-"it's"-sparsemm-edge"""
_SPACE = "\t"


class _Generation(Extension):
    """Hugging Face's `{% generation %}` blocks mark the reply for training; here they are plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Parts(list[dict[str, str]]):
    """The parts of a message. A template that wants text and prints them fails, and prints no list."""

    def __str__(self) -> str:
        raise TemplateError("it takes a message's text, not a list of its parts")

    __repr__ = __str__


def read_template(given: str) -> str:
    """A template as a user gives it: jinja text, or the path of a file that holds it.

    Raises:
        SparseMMError: the file cannot be read, or the text is not text.
    """
    if "{" not in given:
        return read_text(Path(given))
    check_text(given, "the chat template")
    return given


def render(
    template: str, prompt: str, n_images: int, *, marker: str, bos: str, eos: str, first: bool = True
) -> str:
    """The prompt text for one user message, with a marker for each image, up to where the reply starts.

    Before a message that is not the first stands what the template writes at the end of a reply. What was
    said before is not part of the text: it is in the KV cache.

    The template itself says what stands between an image and the text, so a message is given to it as a list
    of parts (images, then text) if it takes one, as Hugging Face processors do. A template that takes only
    text, or that writes for an image what is not in IMAGE_TOKENS, gets the markers as lines of text before
    the prompt.

    Args:
        template: jinja text.
        prompt: what the user asks; may be empty.
        n_images: images before the text.
        marker: what stands for an image in the result.
        bos, eos: the model's begin and end tokens, as text.
        first: whether the message begins the conversation; otherwise it follows a reply.

    Raises:
        SparseMMError: the template is broken, or leaves out the prompt or the images.
    """
    if marker in prompt:
        raise SparseMMError(f"the prompt holds {marker}, which stands for an image")
    before, after, strips = _around(template, n_images, marker, bos, eos, first)
    return before + (prompt.strip() if strips else prompt) + after


def _around(
    template: str, n_images: int, marker: str, bos: str, eos: str, first: bool
) -> tuple[str, str, bool]:
    """What a template writes before and after a question, and whether it strips white space off it.

    The question is a stand-in, so that nothing in a user's question is taken for a part of the template.
    """
    compiled = _compiled(template)

    def rendered(question: Any, reply: Any) -> str:
        earlier = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        messages = [*([] if first else earlier), {"role": "user", "content": question}]
        return compiled.render(messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos)

    problem: Exception | str = "it leaves out the question or its images"
    lines = f"{marker}\n" * n_images
    shapes: list[tuple[Callable[[str], Any], bool]] = [
        (lambda text: _Parts([{"type": "image"}] * n_images + _text_part(text)), True),
        (lambda text: lines + text, False),
        (lambda text: _Parts(_text_part(lines + text)), False),
    ]
    for shape, marks in shapes:
        for reply in (_Parts(_text_part(_REPLY)), _REPLY):
            try:
                text = rendered(shape(_QUESTION), reply)
                spaced = rendered(shape(_SPACE + _QUESTION + _SPACE), reply)
            except Exception as error:  # a template is a program: it may fail in every way there is
                problem = error
                continue
            if not first:
                _, found, text = text.rpartition(_REPLY)
                if not found:
                    continue
            before, found, after = text.rpartition(_QUESTION)
            if not found:
                continue
            if marks:
                before, after = _mark_images(before, after, n_images, marker)
            if (before + after).count(marker) == n_images:
                return before, after, _SPACE + _QUESTION + _SPACE not in spaced
    raise _unusable(problem)


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


def _text_part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _mark_images(before: str, after: str, n_images: int, marker: str) -> tuple[str, str]:
    """Put markers in place of the template's image tokens."""
    for token in IMAGE_TOKENS:
        if n_images and before.count(token) + after.count(token) == n_images:
            return before.replace(token, marker), after.replace(token, marker)
    return before, after


def _unusable(problem: Exception | str) -> SparseMMError:
    reason = " ".join(str(problem).split()) or type(problem).__name__
    return SparseMMError(f"the chat template cannot be used ({reason}); give another: --chat-template")


def _raise(message: str) -> None:
    raise TemplateError(message)
