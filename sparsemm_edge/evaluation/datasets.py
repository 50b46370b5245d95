"""Questions about images: the project's own pages, a folder of one's own, and published data sets.

Published ones are read in the layouts in which they are downloaded: OCRBench, TextVQA, DocVQA and ChartQA, as
the authors' JSON with a folder of images, or as Hugging Face parquet files with the images inside.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.evaluation.metrics import check_question
from sparsemm_edge.files import read_text
from sparsemm_edge.pages.grid import (
    DEMO,
    FIRST_TRAINING_SEED,
    GRIDS,
    READ_PROMPT,
    Grid,
    grid_page,
    lookup_prompt,
)

GRID = "grid"
"""The name that stands for the project's own pages (pages/grid.py) where a data set's path is expected; so do
the other names in pages.grid.GRIDS."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")

_SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
_DESCRIBE = "Describe the image in detail."


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        name: names it in reports; no other question of the data set has it.
        page: names its image; questions about the same image share it.
        image: a file, the bytes of one, or a picture.
        prompt: what the model is asked.
        task: questions of a task are reported together.
        metric: one of metrics.METRICS; None: there are no answers to compare with.
        answers: the accepted ones.
    """

    name: str
    page: str
    image: Path | bytes | Image.Image
    prompt: str
    task: str
    metric: str | None = None
    answers: tuple[str, ...] = ()

    def open_image(self) -> Path | Image.Image:
        """The image as VisionModel.tokenize takes it.

        Raises:
            SparseMMError: the bytes are not an image.
        """
        if not isinstance(self.image, bytes):
            return self.image
        try:
            with Image.open(io.BytesIO(self.image)) as opened:
                return opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise SparseMMError(f"{self.page}: not an image that can be read ({error})") from error


@dataclass(frozen=True)
class DataSet:
    """name: where it came from, however much of it is taken; n_predict: tokens that answers need at most."""

    name: str
    questions: tuple[Question, ...]
    n_predict: int


def load(source: str, *, images: Path | None = None, n_pages: int | None = None, seed: int = 0) -> DataSet:
    """Read a data set.

    Args:
        source: `grid` or another name in pages.grid.GRIDS, the project's own pages; a folder that holds one
            JSONL file and its images; or a JSONL, JSON or parquet file, or a folder of parquet files.
        images: the folder of the images, if they are not beside the file as published.
        n_pages: the first images only, with all questions about them; None: all, and 200 of `grid`.
        seed: of `grid`: its pages are those of seeds from here on.

    Raises:
        SparseMMError: no such file, or not a layout that is known; a line that lacks something is named.
    """
    if n_pages is not None and n_pages < 1:
        raise SparseMMError(f"{n_pages} pages were asked for: it must be at least 1")
    if source in GRIDS:
        return grid(200 if n_pages is None else n_pages, seed, GRIDS[source])
    path = Path(source)
    if not path.exists():
        raise SparseMMError(f"no data set at {path}: expected a file, a folder, or the word {GRID}")
    files = _files(path)
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}[files[0].suffix.lower()]
    found = tuple(_first_pages(reader(files, images), n_pages))
    if not found:
        raise SparseMMError(f"{path} holds no questions")
    seen: set[str] = set()
    for question in found:
        if question.name in seen:
            raise SparseMMError(f"{path}: two questions have the name {question.name}")
        seen.add(question.name)
    return DataSet(str(path), found, n_predict=256)


def images_only(folder: Path, prompt: str = _DESCRIBE, n_pages: int | None = None) -> DataSet:
    """All images of a folder with the same prompt and no accepted answers: what fidelity needs."""
    if not folder.is_dir():
        raise SparseMMError(f"{folder} is not a folder of images")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)[:n_pages]
    if not files:
        raise SparseMMError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    questions = tuple(Question(file.name, file.name, file, prompt, "images") for file in files)
    return DataSet(str(folder), questions, n_predict=128)


def grid(n_pages: int, seed: int = 0, kind: Grid = DEMO) -> DataSet:
    """The project's own pages, held out from training: read each, and look one key up."""
    if not 0 <= seed <= FIRST_TRAINING_SEED - n_pages:
        raise SparseMMError(
            f"pages of seeds {seed} to {seed + n_pages - 1} were asked for: those from 0 to"
            f" {FIRST_TRAINING_SEED - 1} are held out from training"
        )
    questions = []
    for page_seed in range(seed, seed + n_pages):
        page = grid_page(page_seed, grid=kind)
        key, line = page.lookups[np.random.default_rng(page_seed).integers(len(page.lookups))]
        for task, prompt, metric, answer in (
            ("lookup", lookup_prompt(key), "exact_match", line),
            ("reading", READ_PROMPT, "cer", page.text),
        ):
            questions.append(
                Question(f"{page.name}/{task}", page.name, page.image, prompt, task, metric, (answer,))
            )
    return DataSet(f"{kind.name}, seeds from {seed}", tuple(questions), n_predict=96)


def _files(path: Path) -> list[Path]:
    """The file, or the files of a folder: one JSONL file, one JSON file, or all parquet files."""
    suffixes = (".jsonl", ".parquet", ".json")
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise SparseMMError(f"{path}: expected a file that ends in {', '.join(suffixes)}")
        return [path]
    for suffix in suffixes:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == suffix)
        if len(files) > 1 and suffix != ".parquet":
            raise SparseMMError(f"{path} holds {len(files)} {suffix} files: say which of them is meant")
        if files:
            return files
    raise SparseMMError(f"{path} holds no data set: expected a file that ends in {', '.join(suffixes)}")


def _first_pages(questions: Iterator[Question], n_pages: int | None) -> Iterator[Question]:
    pages: set[str] = set()
    for question in questions:
        if question.page not in pages and len(pages) == n_pages:
            continue
        pages.add(question.page)
        yield question


# --- a folder of one's own


def _read_jsonl(files: list[Path], images: Path | None) -> Iterator[Question]:
    """Lines of `image` (a path from the file's folder), `question`, `answers`, `metric`; `task` if wanted."""
    path = files[0]
    folder = images or path.parent
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SparseMMError(f"{where}: not JSON ({error})") from error
        image, prompt = _string(row, "image", where), _string(row, "question", where)
        answers = _strings(row, "answers", where)
        metric = _string(row, "metric", where)
        check_question(metric, answers, where)
        task = str(row.get("task", metric))
        yield Question(f"{number}: {image}", image, folder / image, prompt, task, metric, answers)


# --- the authors' JSON


def _read_json(files: list[Path], images: Path | None) -> Iterator[Question]:
    path = files[0]
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise SparseMMError(f"{path}: not a JSON file ({error})") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise SparseMMError(f"{path}: expected a list of questions, or one under the key data")
    layout = next((layout for layout in _JSON_LAYOUTS if layout.fits(rows[0])), None)
    if layout is None:
        raise SparseMMError(f"{path}: {_unknown(rows[0], _JSON_LAYOUTS)}")
    for number, row in enumerate(rows):
        where = f"{path}, question {number}"
        name = _string(row, layout.image, where) + layout.suffix
        # as published: beside the file, in the folder that the authors' archive has, or where the user says
        candidates = [folder / name for folder in ([images] if images else layout.folders(path.parent))]
        image = next((each for each in candidates if each.is_file()), candidates[0])
        yield layout.question(row, number, where, page=name, image=image)


# --- Hugging Face parquet


def _read_parquet(files: list[Path], images: Path | None) -> Iterator[Question]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SparseMMError(
            "parquet files are read with pyarrow: pip install 'sparsemm-edge[eval]'"
        ) from error
    number = 0
    for path in files:
        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    layout = next((layout for layout in _PARQUET_LAYOUTS if layout.fits(row)), None)
                    if layout is None:
                        raise SparseMMError(f"{path}: {_unknown(row, _PARQUET_LAYOUTS)}")
                    where = f"{path}, row {number}"
                    content = row[layout.image]
                    image = content.get("bytes") if isinstance(content, dict) else content
                    if not isinstance(image, bytes):
                        raise SparseMMError(f"{where}: the image is not in the file, as bytes under image")
                    page = f"image {hashlib.sha256(image).hexdigest()[:12]}"
                    yield layout.question(row, number, where, page=page, image=image)
                    number += 1
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OSError) as error:
            raise SparseMMError(f"{path}: cannot be read as parquet ({error})") from error


# --- layouts


@dataclass(frozen=True)
class _Layout:
    """How a data set is published.

    Attributes:
        name: of the data set.
        keys: what every row has; the first layout whose keys are there is it.
        image, prompt, answers: the keys of the image, the question and the accepted answers.
        metric: of its questions, or what tells it from a row.
        number: the key of the question's own number, "" if it has none.
        extra: added to every question.
        suffix: of image file names.
        image_folders: where the authors' archives have the images, from the file's folder.
    """

    name: str
    keys: tuple[str, ...]
    image: str
    prompt: str
    answers: str
    metric: str | Callable[[dict[str, Any]], str]
    number: str = ""
    extra: str = ""
    suffix: str = ""
    image_folders: tuple[str, ...] = ()

    def fits(self, row: dict[str, Any]) -> bool:
        return all(key in row for key in self.keys)

    def folders(self, parent: Path) -> list[Path]:
        return [parent / folder for folder in self.image_folders]

    def question(
        self, row: dict[str, Any], number: int, where: str, *, page: str, image: Path | bytes
    ) -> Question:
        metric = self.metric if isinstance(self.metric, str) else self.metric(row)
        answers = _strings(row, self.answers, where)
        check_question(metric, answers, where)
        return Question(
            name=f"{self.name} {row[self.number] if self.number else number}",
            page=page,
            image=image,
            prompt=_string(row, self.prompt, where) + self.extra,
            task=self.name,
            metric=metric,
            answers=answers,
        )


def _ocrbench_metric(row: dict[str, Any]) -> str:
    source = row.get("dataset_name", row.get("dataset"))
    return "ocrbench_formula" if source == "HME100k" else "ocrbench"


_JSON_LAYOUTS = (
    _Layout(
        "OCRBench",
        ("dataset_name", "image_path", "question", "answers"),
        image="image_path",
        prompt="question",
        answers="answers",
        metric=_ocrbench_metric,
        image_folders=(".", "OCRBench_Images"),
    ),
    _Layout(
        "TextVQA",
        ("image_id", "question_id", "question", "answers"),
        image="image_id",
        prompt="question",
        answers="answers",
        metric="vqa_accuracy",
        number="question_id",
        extra=_SHORT_ANSWER,
        suffix=".jpg",
        image_folders=("train_images", "train_val_images/train_images", "."),
    ),
    _Layout(
        "DocVQA",
        ("questionId", "docId", "image", "question", "answers"),
        image="image",
        prompt="question",
        answers="answers",
        metric="anls",
        number="questionId",
        extra=_SHORT_ANSWER,
        image_folders=(".", "spdocvqa_images", "val"),
    ),
    _Layout(
        "ChartQA",
        ("imgname", "query", "label"),
        image="imgname",
        prompt="query",
        answers="label",
        metric="relaxed_accuracy",
        extra=_SHORT_ANSWER,
        image_folders=("png", "."),
    ),
)

_PARQUET_LAYOUTS = (
    _Layout(
        "OCRBench",
        ("dataset", "question_type", "question", "answer", "image"),
        image="image",
        prompt="question",
        answers="answer",
        metric=_ocrbench_metric,
    ),
    _Layout(
        "DocVQA",
        ("questionId", "docId", "question", "answers", "image"),
        image="image",
        prompt="question",
        answers="answers",
        metric="anls",
        number="questionId",
        extra=_SHORT_ANSWER,
    ),
    _Layout(
        "TextVQA",
        ("image_id", "question_id", "question", "answers", "image"),
        image="image",
        prompt="question",
        answers="answers",
        metric="vqa_accuracy",
        number="question_id",
        extra=_SHORT_ANSWER,
    ),
    _Layout(
        "ChartQA",
        ("type", "question", "answer", "image"),
        image="image",
        prompt="question",
        answers="answer",
        metric="relaxed_accuracy",
        extra=_SHORT_ANSWER,
    ),
    _Layout(
        "ChartQA",
        ("query", "label", "image"),
        image="image",
        prompt="query",
        answers="label",
        metric="relaxed_accuracy",
        extra=_SHORT_ANSWER,
    ),
)


def _unknown(row: dict[str, Any], layouts: Sequence[_Layout]) -> str:
    known = sorted({layout.name for layout in layouts})
    return f"a question has the keys {', '.join(row)}: not the layout of {', '.join(known)}"


def _string(row: Any, key: str, where: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value:
        raise SparseMMError(f"{where}: {key} is {value!r}, expected a text")
    return value


def _strings(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """One text or a list of them; numbers count as texts."""
    value = row.get(key)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in values):
        raise SparseMMError(f"{where}: {key} is {value!r}, expected a list of texts")
    return tuple(str(each) for each in values)
