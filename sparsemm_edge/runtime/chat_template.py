"""A model's own chat template: a user message with images in, prompt text with image markers out."""

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sparsemm_edge.errors import SparseMMError

# What the templates of LLaVA- and Qwen-VL-like models write for an image. llama.cpp's mtmd puts the model's
# begin and end tokens around an image by itself, so these go as a whole.
IMAGE_TOKENS = ("<|vision_start|><|image_pad|><|vision_end|>", "<image>")


class _Generation(Extension):
    """Hugging Face's `{% generation %}` blocks mark the reply for training; here they are plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def read_template(given: str) -> str:
    """A template as a user gives it: jinja text, or the path of a file that holds it."""
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise SparseMMError(f"cannot read the chat template {given}: {error.strerror or error}") from error
    except ValueError as error:
        raise SparseMMError(f"the chat template {given} is not a text file") from error


# What stands for the reply before a later message; no template changes it
_REPLY = "sparsemm-edge-reply"


def render(
    template: str, prompt: str, n_images: int, *, marker: str, bos: str, eos: str, first: bool = True
) -> str:
    """The prompt text for one user message, with a marker for each image, up to where the reply starts.

    Before a message that is not the first stands what the template writes at the end of a reply. What was
    said before is not part of the text: it is in the KV cache.

    The template itself says what stands between an image and the text, so it is rendered with typed content
    (images, then text) as with Hugging Face processors. A template that knows only plain text, or an image
    token that is not in IMAGE_TOKENS, gets the markers as lines of text before the prompt.

    Args:
        template: jinja text.
        prompt: what the user asks.
        n_images: images before the text.
        marker: what stands for an image in the result.
        bos, eos: the model's begin and end tokens, as text.
        first: whether the message begins the conversation; otherwise it follows a reply.

    Raises:
        SparseMMError: the template is broken, or leaves out the prompt or the images.
    """
    if marker in prompt:
        raise SparseMMError(f"the prompt holds {marker}, which stands for an image")
    images = [{"type": "image"}] * n_images
    lines = "".join(f"{marker}\n" for _ in range(n_images)) + prompt
    contents: tuple[Any, ...] = (
        [*images, {"type": "text", "text": prompt}],
        lines,
        [{"type": "text", "text": lines}],
    )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=_raise, strftime_now=datetime.now().strftime)
    problem = "it does not render the prompt and its images"
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise SparseMMError(f"the chat template is broken: {error}; give another: --chat-template") from error
    for content in contents:
        before = [] if first else _earlier(typed=isinstance(content, list))
        try:
            text = compiled.render(
                messages=[*before, {"role": "user", "content": content}],
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=eos,
            )
        except (TemplateError, TypeError, AttributeError, KeyError) as error:
            problem = str(error)
            continue
        if not first:
            _, found, text = text.rpartition(_REPLY)
            if not found:
                continue
        if content is contents[0] and n_images:
            text = _mark_images(text, prompt, n_images, marker)
        if prompt in text and text.count(marker) == n_images:
            return text
    raise SparseMMError(f"the chat template cannot be used ({problem}); give another: --chat-template")


def _earlier(typed: bool) -> list[dict[str, Any]]:
    """A question and its reply, in the shape that the template takes a message's content in."""

    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if typed else text

    return [
        {"role": "user", "content": content("?")},
        {"role": "assistant", "content": content(_REPLY)},
    ]


def _mark_images(text: str, prompt: str, n_images: int, marker: str) -> str:
    """Put markers in place of the template's image tokens, but not of such words in the prompt."""
    before, found, after = text.partition(prompt)
    for token in IMAGE_TOKENS:
        if before.count(token) + after.count(token) == n_images:
            return before.replace(token, marker) + found + after.replace(token, marker)
    return text


def _raise(message: str) -> None:
    raise TemplateError(message)
