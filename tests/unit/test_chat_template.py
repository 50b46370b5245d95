"""Chat templates: whichever shape of a message a template takes, its text reaches the prompt, and no list."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from helpers.chat_templates import IMAGES, SHAPES, render
from helpers.command_line import CommandLine
from sparsemm_edge import SparseMMError
from sparsemm_edge.runtime.chat_template import read_template


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
