"""A page drawn a moment ago, read by the packaged model: with the full cache and with evicted ones."""

import difflib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.evaluation.metrics import edit_distance
from sparsemm_edge.kept_map import save_kept_map
from sparsemm_edge.pages.grid import FIRST_TRAINING_SEED, READ_PROMPT, SIZE, grid_page, lookup_prompt
from sparsemm_edge.pictures import open_picture
from sparsemm_edge.plot import save_head_map

if TYPE_CHECKING:
    from rich.text import Text

    from sparsemm_edge.runtime import VisionModel

BUDGETS = (64, 32)
WINDOW = 8
N_PREDICT = 96

_HEADINGS = {"full": "full cache", "sparsemm": "{} a head", "uniform": "{}, evenly"}
_PACKAGED = Path(__file__).resolve().parent / "demo_model"


@dataclass(frozen=True)
class DemoModel:
    """The files of the packaged model.

    Attributes:
        model, mmproj: GGUF files of the text model and of its image encoder.
        scores: its head scores.
    """

    model: Path = _PACKAGED / "model-f16.gguf"
    mmproj: Path = _PACKAGED / "mmproj-f16.gguf"
    scores: Path = _PACKAGED / "head-scores.json"

    def __post_init__(self) -> None:
        for path in (self.model, self.mmproj, self.scores):
            if not path.is_file():
                raise SparseMMError(f"{path} is missing: `make setup` in the checkout makes it")


@dataclass(frozen=True)
class Question:
    """A question about the page, and the answer if it is known."""

    prompt: str
    answer: str | None


def run(
    out: Path,
    *,
    seed: int | None = None,
    image: Path | None = None,
    prompt: str | None = None,
    budgets: Sequence[int] = BUDGETS,
) -> dict[str, Any]:
    """Draw a page and ask about it, with the full cache and with evicted ones.

    Every budget is shared out by the head scores; the first one also evenly, for comparison.

    Args:
        out: folder for page.png, head-map.png and kept-map.png; made if it is not there.
        seed: of the page, one that the model was not trained on; None: a new one.
        image: a picture to use instead of a page, resized to the model's size.
        prompt: a question to ask instead of the demo's own.
        budgets: positions that a KV head keeps on average, none for the full cache only.

    Returns:
        `seed` (None with an image), the paths `page`, `head_map` and `kept_map`, and `questions`, each with
        `prompt`, `answer` (None if it is not known) and `runs`: what `generate --json` prints, with `policy`,
        `budget` (None: the full cache) and `errors`, the edit distance in characters to the answer, or, where
        that is not known, to what the full cache says.

    Raises:
        SparseMMError: the packaged model is missing, or an argument cannot be used.
    """
    from sparsemm_edge.runtime import VisionModel

    files = DemoModel()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparseMMError(f"cannot make the folder {out}: {error.strerror}") from error
    if image is not None:
        seed, page, questions = None, _open(image), [Question(READ_PROMPT, None)]
    else:
        seed, page, questions = _draw(seed)
    if prompt is not None:
        questions = [Question(prompt, None)]
    page.save(out / "page.png")

    # one thread: a token of a model this small takes less time than threads take to meet
    with VisionModel.load(files.model, files.mmproj, n_threads=1) as model:
        asked = [_ask(model, files.scores, page, question, budgets) for question in questions]
        if budgets:
            _draw_maps(model, files.scores, page, questions[-1], min(budgets), out)
    return {
        "seed": seed,
        "page": str(out / "page.png"),
        "head_map": str(out / "head-map.png") if budgets else None,
        "kept_map": str(out / "kept-map.png") if budgets else None,
        "questions": asked,
    }


def show(report: dict[str, Any]) -> None:
    """Print the answers side by side, wrong characters marked, and what they took."""
    from rich import box
    from rich.table import Table

    from sparsemm_edge.output import console as output

    console = output()
    drawn = "" if report["seed"] is None else f", drawn from seed {report['seed']}"
    print(f"page: {report['page']}{drawn}")
    for question in report["questions"]:
        runs = question["runs"]
        names = [_HEADINGS[run["policy"]].format(run["budget"]) for run in runs]
        table = Table(title=f"\n{question['prompt']}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("" if question["answer"] is None else "on the page")
        for name in names:
            table.add_column(name)
        truth = runs[0]["text"] if question["answer"] is None else question["answer"]
        answers = [marked(run["text"], truth) for run in runs]
        table.add_row(question["answer"] or "", *answers, end_section=True)
        rows = {
            "characters wrong": [str(run["errors"]) for run in runs],
            "K and V": [_memory(run) for run in runs],
            "prompt positions": [_kept_of_prompt(run) for run in runs],
            "prompt": [f"{run['timings']['prompt_ms']:.0f} ms" for run in runs],
            "a token": [_per_token(run) for run in runs],
        }
        for name, cells in rows.items():
            table.add_row(name, *cells)
        console.print(table)
    for name, key in (("head budgets", "head_map"), ("what the heads kept of the page", "kept_map")):
        if report[key]:
            print(f"{name}: {report[key]}")


def marked(said: str, true: str) -> "Text":
    """What was said: characters that differ in red, a red dot for each that is missing."""
    from rich.text import Text

    text = Text()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, said, true, autojunk=False).get_opcodes():
        text.append(said[a:b], "" if kind == "equal" else "bold red")
        text.append("·" * (d - c - (b - a)), "bold red")
    return text


def _draw(seed: int | None) -> tuple[int, Image.Image, list[Question]]:
    if seed is None:
        seed = secrets.randbelow(FIRST_TRAINING_SEED)
    if not 0 <= seed < FIRST_TRAINING_SEED:
        raise SparseMMError(f"the seed is {seed}: it must be 0 to {FIRST_TRAINING_SEED - 1}")
    page = grid_page(seed)
    key, answer = page.lookups[seed % len(page.lookups)]
    return seed, page.image, [Question(READ_PROMPT, page.text), Question(lookup_prompt(key), answer)]


def _open(path: Path) -> Image.Image:
    return open_picture(path).resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _ask(
    model: "VisionModel", scores: Path, page: Image.Image, question: Question, budgets: Sequence[int]
) -> dict[str, Any]:
    """One question with every cache."""
    from sparsemm_edge.runtime import Eviction, generate

    runs: list[dict[str, Any]] = []
    settings = [("full", None), *(("sparsemm", budget) for budget in budgets)]
    settings += [("uniform", budget) for budget in budgets[:1]]
    for policy, budget in settings:
        eviction = Eviction(policy=policy, budget=budget, window=WINDOW, scores=scores)
        answer = generate(model, question.prompt, [page], n_predict=N_PREDICT, eviction=eviction)
        text = "".join(answer)
        truth = question.answer
        if truth is None:
            truth = runs[0]["text"] if runs else text
        judged = {"policy": policy, "budget": budget, "errors": edit_distance(text, truth)}
        runs.append({**judged, **answer.stats().figures(text)})
    return {"prompt": question.prompt, "answer": question.answer, "runs": runs}


def _draw_maps(
    model: "VisionModel", scores: Path, page: Image.Image, question: Question, budget: int, out: Path
) -> None:
    """Head budgets, and over the page what the heads kept when they were asked this question."""
    from sparsemm_edge.runtime import Eviction, start_session

    with model.tokenize(model.chat_prompt(question.prompt, 1), [page]) as prompt:
        grid = model.image_grid(prompt)
        eviction = Eviction(budget=budget, window=WINDOW, scores=scores)
        with start_session(model, prompt, n_predict=1, eviction=eviction) as session:
            session.read_prompt()
            kept = session.kept()
    n_kept = np.array([[len(head) for head in layer] for layer in kept])
    save_head_map(n_kept, out / "head-map.png", title=f"positions kept, mean {budget}")
    save_kept_map(
        page, kept, grid, out / "kept-map.png", view="head", title=f"{question.prompt} Budget {budget}"
    )


def _memory(run: dict[str, Any]) -> str:
    """Bytes of K and V: what the positions take in the full cache, what is allocated in an evicted one."""
    full, evicted = run["kv"]["bytes_full"], run["kv"]["n_evictions"] > 0
    taken = run["kv"]["bytes_now"] if evicted else full
    return f"{taken / 2**20:.2f} MiB ({taken / full:.0%})"


def _kept_of_prompt(run: dict[str, Any]) -> str:
    """Of the prompt's positions those kept, mean over heads: every head holds the reply too."""
    # the last token of a reply that was cut short is never appended
    reply = min(run["n_generated"], N_PREDICT - 1)
    return f"{run['kv']['positions_kept_mean'] - reply:.0f} of {run['n_prompt']}"


def _per_token(run: dict[str, Any]) -> str:
    per_token = run["timings"]["decode_ms_per_token"]
    return "-" if per_token is None else f"{per_token:.2f} ms"
