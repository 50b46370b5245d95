"""Data sets are read as they are published: small files made by hand in the same layouts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.evaluation.datasets import DataSet, images_only, load

SHORT = "\nAnswer the question using a single word or phrase."


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, data: bytes | str | list[Any] | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(data, bytes | str):
        data = json.dumps(data)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def summary(data: DataSet) -> list[tuple[str, str, str | None, tuple[str, ...]]]:
    return [(each.name, each.prompt, each.metric, each.answers) for each in data.questions]


# --- one's own


def test_a_folder_with_a_jsonl_of_questions(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", png("red"))
    lines = [
        {"image": "images/a.png", "question": "Colour?", "answers": ["red"], "metric": "exact_match"},
        {
            "image": "images/a.png",
            "question": "How many?",
            "answers": 3,
            "metric": "anls",
            "task": "counting",
        },
    ]
    put(tmp_path / "questions.jsonl", "\n\n".join(json.dumps(line) for line in lines))
    data = load(str(tmp_path))
    assert summary(data) == [
        ("1: images/a.png", "Colour?", "exact_match", ("red",)),
        ("3: images/a.png", "How many?", "anls", ("3",)),
    ]
    assert [question.task for question in data.questions] == ["exact_match", "counting"]
    assert len({question.page for question in data.questions}) == 1
    assert data.questions[0].open_image() == tmp_path / "images" / "a.png"
    elsewhere = load(str(tmp_path / "questions.jsonl"), images=tmp_path / "other")
    assert elsewhere.questions[0].image == tmp_path / "other" / "images" / "a.png"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: not JSON"),
        pytest.param("[" * 100_000, "line 1: not JSON", id="nested"),
        ("[]", "line 1: image is None, expected a text"),
        ('{"image": "a.png", "question": "", "answers": ["x"], "metric": "anls"}', "question is ''"),
        ('{"image": "a.png", "question": "?", "answers": {}, "metric": "anls"}', "expected a list of texts"),
        ('{"image": "a.png", "question": "?", "answers": ["x"], "metric": "best"}', "unknown metric 'best'"),
        ("", "holds no questions"),
    ],
)
def test_a_line_that_is_wrong_is_named(line: str, said: str, tmp_path: Path) -> None:
    put(tmp_path / "q.jsonl", line)
    with pytest.raises(SparseMMError, match=said):
        load(str(tmp_path))


def test_a_question_may_hold_what_unicode_calls_a_line_end(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png("red"))
    question = "One?\u2028Two?\u0085Three?\x0b\x0c"
    line = {"image": "a.png", "question": question, "answers": ["red"], "metric": "exact_match"}
    text = "\ufeff\n" + json.dumps(line, ensure_ascii=False).replace("\\u000b", "\x0b").replace("\\f", "\x0c")
    put(tmp_path / "q.jsonl", text + "\r\n")
    assert summary(load(str(tmp_path))) == [("2: a.png", question, "exact_match", ("red",))]
    put(tmp_path / "q.jsonl", text.encode("utf-16"))
    assert summary(load(str(tmp_path)))[0][1] == question


def test_a_folder_of_images_needs_no_questions(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "notes.txt"):
        put(tmp_path / name, b"")
    data = images_only(tmp_path, "What is it?")
    assert [(each.name, each.prompt, each.metric) for each in data.questions] == [
        ("a.PNG", "What is it?", None),
        ("b.jpg", "What is it?", None),
    ]
    assert data.notes == (f"{tmp_path}: skipped, as they are no image files: notes.txt",)
    assert len(images_only(tmp_path, "What is it?", n_pages=1).questions) == 1
    with pytest.raises(SparseMMError, match="holds no images"):
        images_only(put(tmp_path / "empty" / "x.txt", b"").parent, "What is it?")


def test_the_projects_own_pages_are_read_and_looked_up() -> None:
    data = load("grid", n_pages=3, seed=40)
    assert [question.name for question in data.questions[:3]] == [
        "grid-40/lookup",
        "grid-40/reading",
        "grid-41/lookup",
    ]
    for lookup, reading in zip(data.questions[::2], data.questions[1::2], strict=True):
        assert lookup.page == reading.page
        assert (lookup.metric, reading.metric) == ("exact_match", "cer")
        assert lookup.answers[0] in reading.answers[0].splitlines()
        assert lookup.answers[0].split()[0] in lookup.prompt
        # up to three other keys of the page after the first, and that one after reading
        keys = [each.answers[0] for each in (lookup, *lookup.later)]
        assert len(set(keys)) == len(keys) == min(4, len(reading.answers[0].splitlines()))
        assert set(keys) <= set(reading.answers[0].splitlines())
        assert [each.name for each in reading.later] == [lookup.name]
    again = load("grid", n_pages=3, seed=40)
    assert summary(again) == summary(data)
    assert again.questions[0].image.tobytes() == data.questions[0].image.tobytes()  # type: ignore[union-attr]
    with pytest.raises(SparseMMError, match="held out"):
        load("grid", n_pages=10, seed=999_995)


# --- published JSON


def test_ocrbench_json(tmp_path: Path) -> None:
    put(tmp_path / "OCRBench_Images" / "IIIT5K" / "1.png", png("red"))
    row = {"dataset_name": "IIIT5K", "image_path": "IIIT5K/1.png", "question": "what is written?", "id": 0}
    formula = row | {"dataset_name": "HME100k", "answers": "x ^ 2"}
    file = put(tmp_path / "OCRBench.json", [row | {"answers": ["CENTRE"], "type": "Regular"}, formula])
    data = load(str(file))
    assert summary(data) == [
        ("OCRBench 0", "what is written?", "ocrbench", ("CENTRE",)),
        ("OCRBench 1", "what is written?", "ocrbench_formula", ("x ^ 2",)),
    ]
    assert data.questions[0].image == tmp_path / "OCRBench_Images" / "IIIT5K" / "1.png"


def test_textvqa_json(tmp_path: Path) -> None:
    put(tmp_path / "train_images" / "003a.jpg", png("red"))
    row = {"question": "what brand?", "image_id": "003a", "question_id": 34602, "answers": ["nous"] * 10}
    data = load(str(put(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})))
    assert summary(data) == [("TextVQA 34602", "what brand?" + SHORT, "vqa_accuracy", ("nous",) * 10)]
    assert data.questions[0].image == tmp_path / "train_images" / "003a.jpg"


def test_docvqa_json(tmp_path: Path) -> None:
    put(tmp_path / "documents" / "ab_1.png", png("red"))
    row = {"questionId": 49153, "question": "Whose name?", "image": "documents/ab_1.png", "docId": 14465}
    rows = [row | {"answers": ["A. B.", "AB"]}, row | {"questionId": 49154, "answers": ["x"]}]
    data = load(str(put(tmp_path / "val_v1.0.json", {"dataset_name": "docvqa", "data": rows})), n_pages=1)
    assert summary(data)[0] == ("DocVQA 49153", "Whose name?" + SHORT, "anls", ("A. B.", "AB"))
    assert data.questions[0].page == data.questions[1].page
    # the first about an image is followed by the others
    assert [[each.name for each in question.later] for question in data.questions] == [["DocVQA 49154"], []]
    assert data.questions[0].image == tmp_path / "documents" / "ab_1.png"


def test_a_question_without_a_number_gets_one(tmp_path: Path) -> None:
    row = {"questionId": 7, "question": "?", "image": "a.png", "docId": 1, "answers": ["x"]}
    rows = [row, {key: value for key, value in row.items() if key != "questionId"}]
    data = load(str(put(tmp_path / "val.json", rows)))
    assert [question.name for question in data.questions] == ["DocVQA 7", "DocVQA 1"]


def test_chartqa_json(tmp_path: Path) -> None:
    put(tmp_path / "png" / "41.png", png("red"))
    rows = [{"imgname": "41.png", "query": "How many food items?", "label": "14"}]
    data = load(str(put(tmp_path / "val_human.json", rows)))
    assert summary(data) == [("ChartQA 0", "How many food items?" + SHORT, "relaxed_accuracy", ("14",))]
    assert data.questions[0].image == tmp_path / "png" / "41.png"


# --- published parquet


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"dataset": "IIIT5K", "question": "what?", "question_type": "Regular", "answer": ["CENTRE"]},
            ("OCRBench 0", "what?", "ocrbench", ("CENTRE",)),
        ),
        (
            {"dataset": "HME100k", "question": "what?", "question_type": "HMER", "answer": ["x ^ 2"]},
            ("OCRBench 0", "what?", "ocrbench_formula", ("x ^ 2",)),
        ),
        (
            {"image_id": "003a", "question_id": 34602, "question": "what?", "answers": ["nous"] * 10},
            ("TextVQA 34602", "what?" + SHORT, "vqa_accuracy", ("nous",) * 10),
        ),
        (
            {"questionId": "337", "docId": 279, "question": "what?", "answers": ["1/8/93", "1/8"]},
            ("DocVQA 337", "what?" + SHORT, "anls", ("1/8/93", "1/8")),
        ),
        (
            {
                "questionId": "98313",
                "question": "what?",
                "answers": ["pinterest"],
                "answer_type": ["single span"],
                "image_url": "https://x",
                "operation/reasoning": [""],
                "ocr": "{}",
                "data_split": "val",
            },
            ("InfographicVQA 98313", "what?" + SHORT, "anls", ("pinterest",)),
        ),
        (
            {"id": 1, "question": "what?", "answers": [{"answer": f"{n}"} for n in range(10)]},
            ("questions 0", "what?" + SHORT, "vqa_accuracy", tuple(map(str, range(10)))),
        ),
        ({"query": "what?", "answer": "14"}, ("questions 0", "what?" + SHORT, "anls", ("14",))),
        (
            {"type": "human_test", "question": "what?", "answer": "14"},
            ("ChartQA 0", "what?" + SHORT, "relaxed_accuracy", ("14",)),
        ),
        (
            {"query": "what?", "label": ["14"], "human_or_machine": 0},
            ("ChartQA 0", "what?" + SHORT, "relaxed_accuracy", ("14",)),
        ),
    ],
)
def test_parquet_holds_the_images(row: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path) -> None:
    image = {"bytes": png("red"), "path": None}
    data = load(str(parquet(tmp_path / "data" / "val-00000-of-00001.parquet", [row | {"image": image}])))
    assert summary(data) == [expected]
    opened = data.questions[0].open_image()
    assert isinstance(opened, Image.Image) and opened.getpixel((0, 0)) == (255, 0, 0)


def rows(colour: str, *answers: Any) -> list[dict[str, Any]]:
    """Questions of DocVQA about pictures of one colour."""
    image = {"bytes": png(colour), "path": None}
    return [
        {"questionId": f"{colour} {n}", "docId": n, "question": "?", "answers": answer, "image": image}
        for n, answer in enumerate(answers)
    ]


@pytest.mark.parametrize("folder", [".", "data", "DocVQA"])
@pytest.mark.parametrize("unanswered", [None, [], [""], "no such column"])
def test_the_part_with_answers_is_taken_and_named(folder: str, unanswered: Any, tmp_path: Path) -> None:
    tests = rows("red", unanswered, unanswered)
    if isinstance(unanswered, str):
        tests = [{key: value for key, value in row.items() if key != "answers"} for row in tests]
    parquet(tmp_path / folder / "test-00000-of-00001.parquet", tests)
    for shard in range(2):
        shards = rows("blue" if shard else "green", ["a"])
        parquet(tmp_path / folder / f"validation-{shard:05}-of-00002.parquet", shards)
    parquet(tmp_path / folder / "train-00000-of-00001.parquet", rows("white", ["b"]))
    put(tmp_path / "README.md", "a data set")
    put(tmp_path / "dataset_infos.json", {})
    data = load(str(tmp_path))
    assert [question.name for question in data.questions] == ["DocVQA green 0", "DocVQA blue 0"]
    (note,) = data.notes
    assert "the validation part is taken, not test, training (without answers: test)" in note


def test_a_test_part_with_answers_comes_first_and_parts_without_any_are_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "val-0.parquet", rows("red", ["a"]))
    parquet(tmp_path / "test-0.parquet", rows("blue", None, ["b"]))
    with pytest.raises(SparseMMError, match="row 0: answers is None"):
        load(str(tmp_path))
    parquet(tmp_path / "test-0.parquet", rows("blue", ["b"]))
    assert [question.name for question in load(str(tmp_path)).questions] == ["DocVQA blue 0"]
    for name in ("val-0.parquet", "test-0.parquet"):
        parquet(tmp_path / name, rows("red", None))
    with pytest.raises(SparseMMError, match="none of its parts holds answers: test, validation"):
        load(str(tmp_path))
    for name in ("one", "two"):
        parquet(tmp_path / "several" / name / "val-0.parquet", rows("red", ["a"]))
    with pytest.raises(SparseMMError, match="several data sets: say which of one, two is meant"):
        load(str(tmp_path / "several"))


def test_infographicvqa_json_and_its_parts(tmp_path: Path) -> None:
    put(tmp_path / "infographicsvqa_images" / "1.jpeg", png("red"))
    row = {"questionId": 1, "question": "what?", "image_local_name": "1.jpeg", "ocr_output_file": "1.json"}
    for part, answers in (("test", {}), ("val", {"answers": ["x"]}), ("train", {"answers": ["y"]})):
        put(tmp_path / f"infographicsVQA_{part}_v1.0.json", {"data": [row | answers]})
    data = load(str(tmp_path))
    assert summary(data) == [("InfographicVQA 1", "what?" + SHORT, "anls", ("x",))]
    assert data.questions[0].image == tmp_path / "infographicsvqa_images" / "1.jpeg"
    assert len(data.notes) == 1


def test_a_layout_that_is_not_known_is_read_by_its_columns_and_that_is_said(tmp_path: Path) -> None:
    put(tmp_path / "images" / "1.png", png("red"))
    rows = [{"file_name": "1.png", "query": "what?", "answer": "x", "more": 1}]
    data = load(str(put(tmp_path / "questions.json", rows)))
    assert summary(data) == [("questions 0", "what?" + SHORT, "anls", ("x",))]
    assert data.questions[0].image == tmp_path / "images" / "1.png"
    assert data.notes == (
        f"{tmp_path / 'questions.json'}: no data set that is known; its answers are scored by anls",
    )


def test_questions_about_the_same_image_share_its_page_over_files(tmp_path: Path) -> None:
    for shard, colours in enumerate((["red", "red", "blue"], ["blue", "green"])):
        rows = [
            {"query": "what?", "label": ["14"], "image": {"bytes": png(colour), "path": None}}
            for colour in colours
        ]
        parquet(tmp_path / f"val-{shard}.parquet", rows)
    data = load(str(tmp_path))
    pages = [question.page for question in data.questions]
    assert [pages.index(page) for page in pages] == [0, 0, 2, 2, 4]
    assert len({question.name for question in data.questions}) == 5
    assert len(load(str(tmp_path), n_pages=2).questions) == 4


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet", [{"a": 1}])
    put(tmp_path / "broken" / "x.parquet", b"PAR1")
    put(tmp_path / "x.json", [{"a": 1}])
    put(tmp_path / "text.json", "no")
    put(tmp_path / "two" / "a.jsonl", "")
    put(tmp_path / "two" / "b.jsonl", "")
    put(tmp_path / "empty" / "a.txt", "")
    for source, said in (
        ("nowhere", "no data set at .*nowhere"),
        (tmp_path / "x.parquet", "keys a: not the layout of ChartQA, DocVQA, InfographicVQA, OCRBench"),
        (tmp_path / "broken", "cannot be read as Parquet"),
        (tmp_path / "x.json", "keys a: not the layout of"),
        (tmp_path / "text.json", "not a JSON file"),
        (tmp_path / "two", "holds 2 .jsonl files"),
        (tmp_path / "empty", "holds no data set"),
        (tmp_path / "empty" / "a.txt", "expected a file that ends in"),
    ):
        with pytest.raises(SparseMMError, match=said):
            load(str(source))
