"""Questions about images: the project's own pages, a user's folder, or published data sets.

Published data sets are read as downloaded: OCRBench, TextVQA, DocVQA, InfographicVQA and ChartQA, as the
authors' JSON with a folder of images or as Hugging Face parquet files. Other files work if they have columns
for image, question and answers under the usual names.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.evaluation.metrics import check_question
from sparsemm_edge.files import read_json, read_json_lines, read_parquet
from sparsemm_edge.pages.grid import FIRST_TRAINING_SEED, GRIDS, READ_PROMPT, Grid, grid_page, lookup_prompt
from sparsemm_edge.pictures import open_picture

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")

_GRID_TURNS = 4


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        name: unique in the data set.
        page: identifies its image; questions about the same image share it.
        image: a file, the bytes of one, or a picture.
        prompt: the question.
        task: questions of a task are reported together.
        metric: one of metrics.METRICS; None: no accepted answers.
        answers: accepted answers.
        later: follow-up questions about the same image, in order.
    """

    name: str
    page: str
    image: Path | bytes | Image.Image
    prompt: str
    task: str
    metric: str | None = None
    answers: tuple[str, ...] = ()
    later: tuple["Question", ...] = ()

    def open_image(self) -> Path | Image.Image:
        """The image as VisionModel.tokenize takes it.

        Raises:
            SparseMMError: the bytes are not an image.
        """
        return open_picture(self.image, self.page) if isinstance(self.image, bytes) else self.image


@dataclass(frozen=True)
class DataSet:
    """First questions about images; some have follow-up questions.

    Attributes:
        name: its source.
        questions: all of them.
        n_predict: most tokens of an answer.
        notes: what was left out, one line each.
    """

    name: str
    questions: tuple[Question, ...]
    n_predict: int
    notes: tuple[str, ...] = ()


def load(source: str, *, images: Path | None = None, n_pages: int | None = None, seed: int = 0) -> DataSet:
    """Read a data set.

    Args:
        source: `grid` or another name in pages.grid.GRIDS, the project's own pages; a folder that holds one
            JSONL file and its images; or a JSONL, JSON or parquet file, or a folder of parquet files. Of a
            folder with several parts (test, validation, train) the first one with answers is taken.
        images: the folder of the images, if they are not beside the file as published.
        n_pages: the first images only, with all questions about them; None: all, and 200 of `grid`.
        seed: of `grid`: its pages are those of seeds from here on.

    Raises:
        SparseMMError: no such file, or not a layout that is known; a line that lacks something is named.
    """
    if source in GRIDS:
        return grid(200 if n_pages is None else n_pages, seed, GRIDS[source])
    path = Path(source)
    if not path.exists():
        raise SparseMMError(f"no data set at {path}: expected a file, a folder, or the word grid")
    files, notes = _files(path)
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}[files[0].suffix.lower()]
    found = _of_pages(reader(files, images), n_pages)
    if not found:
        raise SparseMMError(f"{path} holds no questions")
    seen: set[str] = set()
    for question in found:
        if question.name in seen:
            raise SparseMMError(f"{path}: two questions have the name {question.name}")
        seen.add(question.name)
    if found[0].task == _BY_COLUMNS:
        notes.append(f"{path}: no data set that is known; its answers are scored by {found[0].metric}")
    return DataSet(str(path), found, n_predict=256, notes=tuple(notes))


def images_only(folder: Path, prompt: str, n_pages: int | None = None) -> DataSet:
    """All images of a folder with the same prompt and no accepted answers, for fidelity."""
    if not folder.is_dir():
        raise SparseMMError(f"{folder} is not a folder of images")
    entries = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    files = [each for each in entries if each.suffix.lower() in IMAGE_SUFFIXES and each.is_file()]
    if not files:
        raise SparseMMError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    questions = tuple(Question(file.name, file.name, file, prompt, "images") for file in files[:n_pages])
    skipped = [each.name + "/" * each.is_dir() for each in entries if each not in files]
    notes = (f"{folder}: skipped, as they are no image files: {_listed(skipped)}",) if skipped else ()
    return DataSet(str(folder), questions, n_predict=128, notes=notes)


def grid(n_pages: int, seed: int, kind: Grid) -> DataSet:
    """The project's own pages, held out from training: one question reads the page, one looks up a key.

    The look-up is followed by up to three more, reading by one.
    """
    if not 0 <= seed <= FIRST_TRAINING_SEED - n_pages:
        raise SparseMMError(
            f"pages of seeds {seed} to {seed + n_pages - 1} were asked for: those from 0 to"
            f" {FIRST_TRAINING_SEED - 1} are held out from training"
        )
    questions: list[Question] = []
    for page_seed in range(seed, seed + n_pages):
        page = grid_page(page_seed, grid=kind)
        rng = np.random.default_rng(page_seed)
        chosen = int(rng.integers(len(page.lookups)))
        others = rng.permutation([i for i in range(len(page.lookups)) if i != chosen])[: _GRID_TURNS - 1]
        ask = partial(Question, page=page.name, image=page.image)
        lookups = []
        for place, (key, line) in enumerate([page.lookups[i] for i in (chosen, *others)], 1):
            name = f"{page.name}/lookup" + (f" {place}" if place > 1 else "")
            prompt = lookup_prompt(key)
            lookups.append(ask(name, prompt=prompt, task="lookup", metric="exact_match", answers=(line,)))
        name = f"{page.name}/reading"
        reading = ask(name, prompt=READ_PROMPT, task="reading", metric="cer", answers=(page.text,))
        questions.append(replace(lookups[0], later=tuple(lookups[1:])))
        questions.append(replace(reading, later=(lookups[0],)))
    return DataSet(f"{kind.name}, seeds from {seed}", tuple(questions), n_predict=96)


_SUFFIXES = (".jsonl", ".parquet", ".json")
_PARTS = {"test": ("test",), "validation": ("validation", "valid", "val", "dev"), "training": ("train",)}
_N_LOOKED_AT = 16  # rows that tell whether a part has answers


def _files(path: Path) -> tuple[list[Path], list[str]]:
    """The file, or the files of a folder of one type and split; and what was left out."""
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise SparseMMError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES)}")
        return [path], []
    files, notes = _answered_part(_files_of_a_kind(path))
    if len(files) > 1 and (suffix := files[0].suffix.lower()) != ".parquet":
        raise SparseMMError(f"{path} holds {len(files)} {suffix} files: say which of them is meant")
    return files, notes


def _files_of_a_kind(path: Path) -> list[Path]:
    """The files of a folder, or of its one subfolder with parquet files (Hugging Face)."""
    for place, suffix in (("*", ".jsonl"), ("*", ".parquet"), ("*/*", ".parquet"), ("*", ".json")):
        files = sorted(file for file in path.glob(place) if file.suffix.lower() == suffix and file.is_file())
        folders = list(dict.fromkeys(file.parent.name for file in files))
        if len(folders) > 1:
            raise SparseMMError(f"{path} holds several data sets: say which of {_listed(folders)} is meant")
        if files:
            return files
    raise SparseMMError(f"{path} holds no data set: expected a file that ends in {', '.join(_SUFFIXES)}")


def _answered_part(files: list[Path]) -> tuple[list[Path], list[str]]:
    """The files of the first split with answers."""
    parts: dict[str | None, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        part = next((part for part, names in _PARTS.items() if any(name in words for name in names)), None)
        parts.setdefault(part, []).append(file)
    if None in parts or len(parts) < 2:
        return files, []
    unanswered: list[str] = []
    for part in [part for part in _PARTS if part in parts]:
        if any(_is_answered(row) for row in islice(_rows(parts[part][0]), _N_LOOKED_AT)):
            others = ", ".join(str(each) for each in parts if each != part)
            note = f"{parts[part][0].parent}: the {part} part is taken, not {others}"
            if unanswered:
                note += f" (without answers: {', '.join(unanswered)})"
            return parts[part], [note]
        unanswered.append(part)
    raise SparseMMError(f"{files[0].parent}: none of its parts holds answers: {', '.join(unanswered)}")


def _rows(file: Path) -> Iterator[Any]:
    """The rows of a file, in any layout."""
    if file.suffix.lower() == ".parquet":
        yield from read_parquet(file)
    elif file.suffix.lower() == ".json":
        content = read_json(file)
        rows = content.get("data") if isinstance(content, dict) else content
        yield from rows if isinstance(rows, list) else []
    else:
        yield from (row for _, row in read_json_lines(file))


def _is_answered(row: Any) -> bool:
    found = [row.get(key) for key in _ANSWERS] if isinstance(row, dict) else []
    return any(any(each) if isinstance(each, list) else each not in (None, "") for each in found)


def _of_pages(questions: Iterator[Question], n_pages: int | None) -> tuple[Question, ...]:
    """Those about the first images; the first question about an image is followed by the others."""
    pages: dict[str, list[Question]] = {}
    found = []
    for question in questions:
        if question.page in pages or len(pages) != n_pages:
            pages.setdefault(question.page, []).append(question)
            found.append(question)
    later = {first.name: tuple(others) for first, *others in pages.values()}
    return tuple(replace(question, later=later.get(question.name, ())) for question in found)


def _read_jsonl(files: list[Path], images: Path | None) -> Iterator[Question]:
    """Lines of `image` (a path from the file's folder), `question`, `answers`, `metric`; `task` if wanted."""
    path = files[0]
    folder = images or path.parent
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        image, prompt = _string(row, "image", where), _string(row, "question", where)
        answers = _strings(row, "answers", where)
        metric = _string(row, "metric", where)
        check_question(metric, answers, where)
        task = str(row.get("task", metric))
        yield Question(f"{number}: {image}", image, folder / image, prompt, task, metric, answers)


def _read_json(files: list[Path], images: Path | None) -> Iterator[Question]:
    path = files[0]
    rows = list(_rows(path))
    if not rows or not isinstance(rows[0], dict):
        raise SparseMMError(f"{path}: expected a list of questions, or one under the key data")
    layout = _layout(path, rows[0], _JSON_LAYOUTS)
    # as published: beside the file, in the folder that the authors' archive has, or where the user says
    folders = [images] if images else [path.parent / each for each in layout.image_folders]
    for number, row in enumerate(rows):
        where = f"{path}, question {number}"
        name = _string(row, layout.image, where) + layout.suffix
        candidates = [folder / name for folder in folders]
        image = next((each for each in candidates if each.is_file()), candidates[0])
        yield layout.question(row, number, where, page=name, image=image)


def _read_parquet(files: list[Path], images: Path | None) -> Iterator[Question]:
    number = 0
    for path in files:
        for row in read_parquet(path):
            layout = _layout(path, row, _PARQUET_LAYOUTS)
            where = f"{path}, row {number}"
            content = row[layout.image]
            image = content.get("bytes") if isinstance(content, dict) else content
            if not isinstance(image, bytes):
                raise SparseMMError(f"{where}: the image is not in the file, as bytes under image")
            page = f"image {hashlib.sha256(image).hexdigest()[:12]}"
            yield layout.question(row, number, where, page=page, image=image)
            number += 1


@dataclass(frozen=True)
class _Layout:
    """The published format of a data set.

    Attributes:
        name: of the data set.
        metric: of its questions, or a function of the row.
        image, prompt, answers: the keys of the image, the question and the accepted answers.
        number: the key of the question's own number, "" if it has none.
        others: further keys that its rows have.
        extra: added to every question.
        suffix: of image file names.
        image_folders: image folders in the authors' archives, relative to the file.
    """

    name: str
    metric: str | Callable[[dict[str, Any]], str]
    image: str = "image"
    prompt: str = "question"
    answers: str = "answers"
    number: str = ""
    others: tuple[str, ...] = ()
    extra: str = "\nAnswer the question using a single word or phrase."
    suffix: str = ""
    image_folders: tuple[str, ...] = ()

    def fits(self, row: dict[str, Any]) -> bool:
        keys = (self.image, self.prompt, self.answers, *self.others)
        return all(key in row for key in keys) and (not self.number or self.number in row)

    def question(
        self, row: dict[str, Any], number: int, where: str, *, page: str, image: Path | bytes
    ) -> Question:
        metric = self.metric if isinstance(self.metric, str) else self.metric(row)
        answers = _strings(row, self.answers, where)
        check_question(metric, answers, where)
        name = f"{self.name} {row.get(self.number, number) if self.number else number}"
        prompt = _string(row, self.prompt, where) + self.extra
        return Question(name, page, image, prompt, self.name, metric, answers)


_BY_COLUMNS = "questions"
_IMAGES = ("image", "image_path", "img", "image_file", "image_local_name", "imgname", "file_name", "filename")
_QUESTIONS = ("question", "query")
_ANSWERS = ("answers", "answer", "label", "labels")


def _layout(path: Path, row: dict[str, Any], known: Sequence[_Layout]) -> _Layout:
    """The first layout that fits a row of a file, or one by the usual names of its columns."""
    for layout in known:
        if layout.fits(row):
            return layout
    image, prompt, answers = (
        next((name for name in names if name in row), "") for names in (_IMAGES, _QUESTIONS, _ANSWERS)
    )
    if not image or not prompt or not answers:
        names = sorted({layout.name for layout in known})
        raise SparseMMError(
            f"{path}: a question has the keys {', '.join(row)}: not the layout of {', '.join(names)}, and not"
            " an image, a question and answers"
        )

    def metric(row: dict[str, Any]) -> str:
        return "vqa_accuracy" if len(_strings(row, answers, str(path))) >= 10 else "anls"

    return _Layout(_BY_COLUMNS, metric, image, prompt, answers, image_folders=(".", "images"))


def _ocrbench_metric(row: dict[str, Any]) -> str:
    source = row.get("dataset_name", row.get("dataset"))
    return "ocrbench_formula" if source == "HME100k" else "ocrbench"


_JSON_LAYOUTS = (
    _Layout(
        "OCRBench",
        _ocrbench_metric,
        image="image_path",
        others=("dataset_name",),
        extra="",
        image_folders=(".", "OCRBench_Images"),
    ),
    _Layout(
        "TextVQA",
        "vqa_accuracy",
        image="image_id",
        number="question_id",
        suffix=".jpg",
        image_folders=("train_images", "train_val_images/train_images", "."),
    ),
    _Layout(
        "DocVQA",
        "anls",
        number="questionId",
        others=("docId",),
        image_folders=(".", "spdocvqa_images", "val"),
    ),
    _Layout(
        "InfographicVQA",
        "anls",
        image="image_local_name",
        number="questionId",
        image_folders=(".", "infographicsvqa_images", "infographicVQA_val_v1.0_images", "images"),
    ),
    _Layout("ChartQA", "relaxed_accuracy", "imgname", "query", "label", image_folders=("png", ".")),
)

_PARQUET_LAYOUTS = (
    _Layout("OCRBench", _ocrbench_metric, answers="answer", others=("dataset", "question_type"), extra=""),
    _Layout("DocVQA", "anls", number="questionId", others=("docId",)),
    _Layout("InfographicVQA", "anls", number="questionId", others=("answer_type",)),
    _Layout("TextVQA", "vqa_accuracy", number="question_id", others=("image_id",)),
    _Layout("ChartQA", "relaxed_accuracy", answers="answer", others=("type",)),
    _Layout("ChartQA", "relaxed_accuracy", prompt="query", answers="label"),
)


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _string(row: Any, key: str, where: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value:
        raise SparseMMError(f"{where}: {key} is {value!r}, expected a text")
    return value


def _strings(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """One text or a list of them, or of objects with an `answer`; numbers count as texts."""
    value = row.get(key)
    values = value if isinstance(value, list) else [value]
    values = [each.get("answer") if isinstance(each, dict) else each for each in values]
    if not all(type(each) in (str, int, float) for each in values):
        raise SparseMMError(f"{where}: {key} is {value!r}, expected a list of texts")
    return tuple(str(each) for each in values)
