"""Chat templates: whichever shape of a message a template takes, its text reaches the prompt, and no list."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from conftest import CommandLine
from sparsemm_edge import SparseMMError
from sparsemm_edge.runtime.chat_template import read_template, render

# Templates of the shapes that models bring: what they do with a message, and what they write around it.
LLAMA_3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}A chat. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content.strip() }}"
    " ASSISTANT:{% else %} {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if 'image' in part or part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m.role %}{% endif %}{{ '<start_of_turn>' + role + '\n' }}{% if m.content is string %}"
    "{{ m.content | trim }}{% elif m.content is iterable %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
LLAVA = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for part in m.content %}{% if part.type == 'image' %}"
    "<image>\n{% endif %}{% endfor %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# of a reply only the text is taken, of a question only the parts
MIXED = (
    "{% for m in messages %}{% if m.role == 'user' %}{% for part in m.content %}{% if part.type == 'image' %}"
    "<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% else %}{{ '=' + m.content + ';' }}{% endif %}"
    "{% endfor %}"
)

HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
# template: whether it strips a message, the first prompt and a later one, with @ for images and question
SHAPES = {
    "llama-3": (
        LLAMA_3,
        True,
        f"<s>{HEADER.format('user')}@<|eot_id|>{HEADER.format('assistant')}",
        f"<|eot_id|>{HEADER.format('user')}@<|eot_id|>{HEADER.format('assistant')}",
    ),
    "mistral": (MISTRAL, False, "<s>[INST] @ [/INST]", "</s>[INST] @ [/INST]"),
    "vicuna": (VICUNA, True, "<s>A chat. USER: @ ASSISTANT:", "</s>USER: @ ASSISTANT:"),
    "chatml": (
        CHATML,
        False,
        "<|im_start|>user\n@<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n@<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen": (
        QWEN,
        False,
        "<|im_start|>user\n@<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n@<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma": (
        GEMMA,
        True,
        "<s><start_of_turn>user\n@<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n<start_of_turn>user\n@<end_of_turn>\n<start_of_turn>model\n",
    ),
    "deepseek": (DEEPSEEK, False, "<s><|User|>@<|Assistant|>", "</s><|User|>@<|Assistant|>"),
    "llava": (LLAVA, False, "USER: @ ASSISTANT:", " USER: @ ASSISTANT:"),
    "mixed": (MIXED, False, "@", ";@"),
}
IMAGES = {"qwen": "<M>", "mixed": "<M>"}  # the others: a marker and a line end


def filled(shape: str, name: str, question: str, n_images: int) -> str:
    return shape.replace("@", IMAGES.get(name, "<M>\n") * n_images + question)


@pytest.mark.parametrize("n_images", [0, 1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gets_the_text_and_the_images_as_it_takes_them(name: str, n_images: int) -> None:
    template, _, first, later = SHAPES[name]
    arguments = {"marker": "<M>", "bos": "<s>", "eos": "</s>"}
    question = "What's \"this\"? [{'type': 'text'}] <image> {{ 7 * 7 }}"
    assert render(template, question, n_images, **arguments) == filled(first, name, question, n_images)
    found = render(template, question, n_images, **arguments, first=False)
    assert found == filled(later, name, question, n_images)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("question", ["", " ", "what? \n", "\n what?"])
def test_white_space_at_the_ends_goes_only_where_the_template_strips_it(name: str, question: str) -> None:
    template, strips, first, _ = SHAPES[name]
    found = render(template, question, 1, marker="<M>", bos="<s>", eos="</s>")
    assert found == filled(first, name, question.strip() if strips else question, 1)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{{ messages[0].content | trim }}",
        "{{ messages[0].content | string }}",
        "{{ messages[0].content | tojson }}",
        "{{ messages[0].content ~ '' }}",
        "{{ '%s' % messages[0].content }}",
        "{{ messages[0].content | join }}",
        "{{ messages[0].content.strip() }}",
        "{% for part in messages[0].content %}{{ part }}{% endfor %}",
    ],
)
def test_no_list_is_printed_into_a_prompt(template: str) -> None:
    try:
        text = render(template, "what?", 1, marker="<M>", bos="", eos="")
    except SparseMMError:
        assert "tojson" in template, "JSON of a text is not the text"
    else:
        assert text == "<M>\nwhat?"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("nothing", "leaves out the question"),
        ("{{ raise_exception('no') }}", r"\(no\)"),
        ("{{ messages", "cannot be used"),
        ("{{ 1 // 0 }}", "cannot be used"),
        ("{{ 'x' * 10**13 }}", "MemoryError"),
        ("{{ messages[0].content + nothing.at.all }}", "undefined"),
        ("{% include 'file' %}", "cannot be used"),
        ("{% for i in range(10**9) %}{% endfor %}", "cannot be used"),
        ("{{ ''.__class__.__mro__ }}", "cannot be used"),
    ],
)
def test_a_template_that_is_none_is_one_line(template: str, said: str) -> None:
    with pytest.raises(SparseMMError, match=said) as caught:
        render(template, "what?", 1, marker="<M>", bos="", eos="")
    assert len(str(caught.value).splitlines()) == 1 and "--chat-template" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"{{ x }}\xc3\xa9\r\n",
        codecs.BOM_UTF8 + b"{{ x }}\xc3\xa9\r\n",
        "\ufeff{{ x }}é\r\n".encode("utf-16"),
        "\ufeff{{ x }}é\r\n".encode("utf-16-be"),
        "{{ x }}é\r\n".encode("utf-16-le"),
    ],
)
def test_a_template_file_may_have_a_mark_and_any_utf(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(data)
    assert read_template(str(tmp_path / "t.jinja")) == "{{ x }}é\r\n"


def test_a_template_of_bytes_is_refused_however_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"{{ x }}\xff\xfe\xe9")
    with pytest.raises(SparseMMError, match=r"t\.jinja: not a text file"):
        read_template(str(tmp_path / "t.jinja"))
    for given in ("{{ x }}\udcff", "\udcff\0.jinja", "x" * 5000):
        with pytest.raises(SparseMMError):
            read_template(given)


def test_generate_reads_as_many_tokens_as_the_text_has(sparsemm: CommandLine) -> None:
    from sparsemm_edge.demo import DemoModel

    files = DemoModel()

    def n_prompt(template: str, prompt: str) -> int:
        arguments = ("generate", "-m", files.model, "--threads", 1, "-n", 1, "--json")
        found = sparsemm(*arguments, "-p", prompt, "--chat-template", template).report["n_prompt"]
        assert isinstance(found, int)
        return found

    plain = n_prompt("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", "What is it?")
    assert n_prompt("{{ messages[0].content }}", "What is it?") == plain
    assert n_prompt("{{ messages[0].content | trim }}", "What is it? ") == plain
