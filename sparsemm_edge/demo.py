"""A page drawn a moment ago, read by the packaged model: with the full cache and with evicted ones."""

import difflib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text

from sparsemm_edge.errors import SparseMMError, check_within, os_errors
from sparsemm_edge.evaluation.metrics import edit_distance
from sparsemm_edge.output import console
from sparsemm_edge.pages.grid import FIRST_TRAINING_SEED, READ_PROMPT, SIZE, grid_page, lookup_prompt
from sparsemm_edge.pictures import open_picture
from sparsemm_edge.reports.head_map import save_head_map
from sparsemm_edge.reports.kept_map import save_kept_map
from sparsemm_edge.runtime import Eviction, GenerationStats, VisionModel, context_for, encode, generate

WINDOW = 8
N_PREDICT = 96

_HEADINGS = {"full": "full cache", "sparsemm": "{} a head", "uniform": "{}, evenly"}
_PACKAGED = Path(__file__).resolve().parent / "demo_model"


@dataclass(frozen=True)
class DemoModel:
    """The files of the packaged model: text model and image encoder in GGUF, head scores."""

    model: Path = _PACKAGED / "model-f16.gguf"
    mmproj: Path = _PACKAGED / "mmproj-f16.gguf"
    scores: Path = _PACKAGED / "head-scores.json"

    def __post_init__(self) -> None:
        for path in (self.model, self.mmproj, self.scores):
            if not path.is_file():
                raise SparseMMError(f"{path} is missing: `make setup` in the checkout makes it")


@dataclass(frozen=True)
class DemoQuestion:
    """A question about the page, and the answer if it is known."""

    prompt: str
    answer: str | None


@dataclass(frozen=True)
class DemoRun:
    """One answer.

    Attributes:
        budget: mean head budget in positions; None: the full cache.
        errors: edit distance in characters to the known answer, or else to the full cache's.
    """

    policy: str
    budget: int | None
    errors: int
    text: str
    stats: GenerationStats

    @property
    def memory(self) -> str:
        """Bytes of K and V: of all positions in the full cache, allocated in an evicted one."""
        kv = self.stats.kv
        taken = kv.bytes_now if kv.n_evictions else kv.bytes_full
        return f"{taken / 2**20:.2f} MiB ({taken / kv.bytes_full:.0%})"

    @property
    def kept_of_prompt(self) -> str:
        """Prompt positions that are kept, mean over heads; every head holds the reply too."""
        # the last token of a reply that was cut short is never appended
        reply = min(self.stats.n_generated, N_PREDICT - 1)
        return f"{self.stats.kv.positions_kept_mean - reply:.0f} of {self.stats.n_prompt}"

    @property
    def per_token(self) -> str:
        per_token = self.stats.timings.decode_ms_per_token
        return "-" if per_token is None else f"{per_token:.2f} ms"

    def to_dict(self) -> dict[str, Any]:
        own = {"policy": self.policy, "budget": self.budget, "errors": self.errors}
        return {**own, **self.stats.to_dict(self.text)}


@dataclass(frozen=True)
class DemoReport:
    """What run() found.

    Attributes:
        seed: of the page; None with an image.
        page, head_map, kept_map: paths of the files written; None: not this one.
        questions: each with its answers, the full cache's first.
    """

    seed: int | None
    page: str
    head_map: str | None
    kept_map: str | None
    questions: list[tuple[DemoQuestion, list[DemoRun]]]

    def to_dict(self) -> dict[str, Any]:
        """As `demo --json` prints it."""
        questions = [
            {**vars(question), "runs": [run.to_dict() for run in runs]} for question, runs in self.questions
        ]
        return {**vars(self), "questions": questions}


def run(
    out: Path, *, seed: int | None, image: Path | None, prompt: str | None, budgets: Sequence[int]
) -> DemoReport:
    """Draw a page and ask about it, with the full cache and with evicted ones.

    Every budget is shared out by the head scores; the first one also evenly, for comparison.

    Args:
        out: folder for page.png, head-map.png and kept-map.png; made if it is not there.
        seed: of the page, one that the model was not trained on; None: a new one.
        image: a picture to use instead of a page, resized to the model's size.
        prompt: a question to ask instead of the demo's own.
        budgets: positions that a KV head keeps on average, none for the full cache only.

    Raises:
        SparseMMError: the packaged model is missing, or an argument cannot be used.
    """
    files = DemoModel()
    with os_errors(f"make the folder {out}"):
        out.mkdir(parents=True, exist_ok=True)
    if image is not None:
        page = open_picture(image).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        seed, questions = None, [DemoQuestion(READ_PROMPT, None)]
    else:
        seed, page, questions = _draw(seed)
    if prompt is not None:
        questions = [DemoQuestion(prompt, None)]
    page.save(out / "page.png")

    # one thread: a token of a model this small takes less time than threads take to meet
    with VisionModel.load(files.model, files.mmproj, n_threads=1) as model:
        asked = [(each, _ask(model, files.scores, page, each, budgets)) for each in questions]
        if budgets:
            _draw_maps(model, files.scores, page, questions[-1], min(budgets), out)
    head_map, kept_map = (str(out / f"{name}-map.png") if budgets else None for name in ("head", "kept"))
    return DemoReport(seed, str(out / "page.png"), head_map, kept_map, asked)


def show(report: DemoReport) -> None:
    """Print the answers side by side, wrong characters marked, and what they took."""
    drawn = "" if report.seed is None else f", drawn from seed {report.seed}"
    print(f"page: {report.page}{drawn}")
    for question, runs in report.questions:
        table = Table(title=f"\n{question.prompt}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("" if question.answer is None else "on the page")
        for run in runs:
            table.add_column(_HEADINGS[run.policy].format(run.budget))
        truth = runs[0].text if question.answer is None else question.answer
        answers = [marked(run.text, truth) for run in runs]
        table.add_row(question.answer or "", *answers, end_section=True)
        rows = {
            "characters wrong": [str(run.errors) for run in runs],
            "K and V": [run.memory for run in runs],
            "prompt positions": [run.kept_of_prompt for run in runs],
            "prompt": [f"{run.stats.timings.prompt_ms:.0f} ms" for run in runs],
            "a token": [run.per_token for run in runs],
        }
        for name, cells in rows.items():
            table.add_row(name, *cells)
        console().print(table)
    if report.head_map is not None:
        print(f"head budgets: {report.head_map}")
        print(f"what the heads kept of the page: {report.kept_map}")


def marked(said: str, true: str) -> Text:
    """What was said: characters that differ in red, a red dot for each that is missing."""
    text = Text()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, said, true, autojunk=False).get_opcodes():
        text.append(said[a:b], "" if kind == "equal" else "bold red")
        text.append("·" * (d - c - (b - a)), "bold red")
    return text


def _draw(seed: int | None) -> tuple[int, Image.Image, list[DemoQuestion]]:
    if seed is None:
        seed = secrets.randbelow(FIRST_TRAINING_SEED)
    check_within("the seed", seed, 0, FIRST_TRAINING_SEED - 1)
    page = grid_page(seed)
    key, answer = page.lookups[seed % len(page.lookups)]
    return seed, page.image, [DemoQuestion(READ_PROMPT, page.text), DemoQuestion(lookup_prompt(key), answer)]


def _ask(
    model: VisionModel, scores: Path, page: Image.Image, question: DemoQuestion, budgets: Sequence[int]
) -> list[DemoRun]:
    """One question with every cache."""
    runs: list[DemoRun] = []
    settings = [("full", None), *(("sparsemm", budget) for budget in budgets)]
    settings += [("uniform", budget) for budget in budgets[:1]]
    for policy, budget in settings:
        eviction = Eviction(policy=policy, budget=budget, window=WINDOW, scores=scores)
        answer = generate(model, question.prompt, [page], n_predict=N_PREDICT, eviction=eviction)
        text = "".join(answer)
        truth = question.answer
        if truth is None:
            truth = runs[0].text if runs else text
        runs.append(DemoRun(policy, budget, edit_distance(text, truth), text, answer.stats()))
    return runs


def _draw_maps(
    model: VisionModel, scores: Path, page: Image.Image, question: DemoQuestion, budget: int, out: Path
) -> None:
    """Head budgets, and over the page what the heads kept when they were asked this question."""
    with model.tokenize(model.chat_prompt(question.prompt, 1), [page]) as prompt:
        grid = model.image_grid(prompt)
        eviction = Eviction(budget=budget, window=WINDOW, scores=scores)
        with context_for(model, prompt, n_predict=1, eviction=eviction) as context:
            context.prefill(encode(model, prompt))
            kept = context.kept()
    n_kept = np.array([[len(head) for head in layer] for layer in kept])
    save_head_map(n_kept, out / "head-map.png", title=f"positions kept, mean {budget}")
    save_kept_map(
        page, kept, grid, out / "kept-map.png", view="head", title=f"{question.prompt} Budget {budget}"
    )
