"""`sparsemm-edge eval`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from sparsemm_edge import defaults
from sparsemm_edge.commands import options
from sparsemm_edge.errors import SparseMMError, os_errors
from sparsemm_edge.files import atomic_path
from sparsemm_edge.output import print_json, progress_bar

_T = TypeVar("_T")


def evaluate(
    loaded: options.ModelOptions,
    kept: options.ImageCacheOptions,
    data: Annotated[
        str | None,
        typer.Option(
            help="Questions: a folder with a JSONL file of image, question, answers, metric; OCRBench,"
            " TextVQA, DocVQA, InfographicVQA or ChartQA as published (JSON or parquet); or the word"
            " grid: this project's own pages."
        ),
    ] = None,
    fidelity_only: Annotated[
        Path | None, typer.Option(help="Instead of --data: a folder of images, no answers needed.")
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="With --fidelity-only: the question about each image.")
    ] = "Describe the image in detail.",
    images: Annotated[
        Path | None, typer.Option(help="Folder of the data set's images [default: as published].")
    ] = None,
    pages: Annotated[
        int | None, typer.Option(help="Number of images, from the first one [default: all; 200 for grid].")
    ] = None,
    retention: Annotated[
        str | None,
        typer.Option(help="Mean head budgets in per cent of the prompt [default: 2.5,5,10,20,50]."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Mean head budgets in positions, instead of --retention.")
    ] = None,
    policies: Annotated[
        str,
        typer.Option(
            help="sparsemm, uniform, pyramid, random; paper, snapkv, pyramidkv: sparsemm, uniform and"
            " pyramid as they were published; full: the full cache in f16, q8_0 and q4_0."
        ),
    ] = "sparsemm,uniform,pyramid,random,paper,snapkv,full",
    votes: Annotated[
        str, typer.Option(help="Votes: mixkv, or snapkv, which uses the window's attention alone.")
    ] = "mixkv",
    residual: Annotated[
        str,
        typer.Option(
            help="Keep a residual slot per head, which summarises what it evicted: yes, no, or both."
        ),
    ] = "yes",
    later: Annotated[
        str,
        typer.Option(
            help="What later questions evict: again, anything; keep, nothing; image: no question evicts, the"
            " image is evicted before the first one."
        ),
    ] = "again",
    turns: Annotated[int, typer.Option(help="Most consecutive questions about an image over one cache.")] = 4,
    cross: Annotated[
        bool,
        typer.Option(help="Also ask a second question in place of the first, after evicting for the first."),
    ] = True,
    window: Annotated[
        str, typer.Option(help="Observation windows; at most a quarter of the budget is used.")
    ] = str(defaults.WINDOW),
    floor_ratio: Annotated[str, typer.Option(help="Floor ratios; the first one is for all policies.")] = str(
        defaults.FLOOR_RATIO
    ),
    water_fill: Annotated[
        str, typer.Option(help="Redistribute what a head cannot use: yes, no, or both (sparsemm).")
    ] = "yes",
    random_seeds: Annotated[int, typer.Option(help="Seeds to average policy random over.")] = 3,
    cache_types: Annotated[str, typer.Option(help="Data types of K and V, such as f16,q8_0.")] = "f16",
    scores: options.Scores = None,
    n_predict: Annotated[
        int | None, typer.Option("--n-predict", "-n", help="Most tokens of an answer [default: the data's].")
    ] = None,
    n_ctx: Annotated[
        int | None,
        typer.Option("--n-ctx", "-c", help="Most positions of prompt and answer [default: as trained]."),
    ] = None,
    chat_template: options.ChatTemplate = None,
    seed: Annotated[
        int, typer.Option("--seed", "-s", help="First seed of the grid pages, and of the bootstrap.")
    ] = 0,
    jobs: Annotated[
        int, typer.Option(help="Processes, each with the model loaded and its share of the cores.")
    ] = 1,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, eval.json and eval.png.")] = Path(
        "sparsemm-eval"
    ),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume from the results in --out; settings and pages may be added."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what eval.json holds.")] = False,
) -> None:
    """Measure accuracy and fidelity to the full cache, over budgets and policies.

    Lists are separated by commas. Each question is asked about a fresh image, with the full cache and with
    every setting; the first question about an image is also followed by the others, as in a chat. Images are
    encoded and prompts computed once. A prompt takes the memory of two full caches.

    \b
    Examples:
      sparsemm-edge eval -m model.sparsemm.gguf --mmproj mmproj.gguf --data DIR --retention 5,10,20
      sparsemm-edge eval -m model.sparsemm.gguf --mmproj mmproj.gguf --fidelity-only my-images/
    """
    from sparsemm_edge.evaluation import datasets
    from sparsemm_edge.evaluation.report import make_report, print_report
    from sparsemm_edge.evaluation.run import EvalJob, Results, run
    from sparsemm_edge.evaluation.settings import settings_of
    from sparsemm_edge.reports.evaluation import save_plot
    from sparsemm_edge.resources import usable_cores

    if (data is None) == (fidelity_only is None):
        raise SparseMMError("give --data with questions, or --fidelity-only with a folder of images")
    settings = settings_of(
        policies=_list("--policies", policies, str),
        budgets=_list("--budgets", budgets, int),
        retentions=_list("--retention", retention or ("" if budgets else "2.5,5,10,20,50"), float),
        windows=_list("--window", window, int),
        floor_ratios=_list("--floor-ratio", floor_ratio, float),
        water_fills=_yes_or_no("--water-fill", water_fill),
        cache_types=_list("--cache-types", cache_types, str),
        votes=_list("--votes", votes, str),
        residuals=_yes_or_no("--residual", residual),
        laters=_list("--later", later, str),
        n_random=random_seeds,
    )
    if loaded.mmproj is None:
        raise SparseMMError("the questions are about images: give the model's image encoder with --mmproj")
    if fidelity_only is not None:
        data_set = datasets.images_only(fidelity_only, prompt, pages)
    else:
        assert data is not None
        data_set = datasets.load(data, images=images, n_pages=pages, seed=seed)
    for note in data_set.notes:
        print(f"note: {note}", file=sys.stderr)
    job = EvalJob(
        model=loaded.model,
        mmproj=loaded.mmproj,
        scores=scores,
        n_predict=n_predict or data_set.n_predict,
        n_ctx=n_ctx,
        n_threads=loaded.threads or max(1, usable_cores() // jobs),
        loading=loaded.loading(kept=kept),
        chat_template=options.template_text(chat_template),
        n_turns=turns,
        cross=cross,
    )
    with os_errors(f"make the folder {out}"):
        out.mkdir(parents=True, exist_ok=True)
    with (
        Results(out / "results.jsonl", job, data_set, resume=resume) as results,
        progress_bar("pages", stays=True, shown=not as_json) as progress,
    ):
        run(job, data_set, settings, results, n_jobs=jobs, progress=progress)
    errors = [record.error for record in results.records.values()]
    if errors and errors[0] is not None and None not in errors:
        raise SparseMMError(
            f"no question could be answered: {errors[0]} (all are in {out / 'results.jsonl'})"
        )

    n_pages = len({question.page for question in data_set.questions})
    asked = [each.name for question in data_set.questions for each in job.asked(question)]
    report = make_report(results.records, settings, asked, seed=seed)
    content = report.to_dict(
        model=job.model.name, mmproj=job.mmproj.name, data=data_set.name, n_pages=n_pages, seed=seed
    )
    with atomic_path(out / "eval.json") as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if report.rows:
        save_plot(report, out / "eval.png", title=f"{job.model.name}: {data_set.name}, {n_pages} images")
    if as_json:
        print_json(content)
    else:
        print_report(report)
        print(f"wrote {out / 'eval.json'}" + (f" and {out / 'eval.png'}" if report.rows else ""))


def _yes_or_no(option: str, text: str) -> tuple[bool, ...]:
    meant = {"yes": (True,), "no": (False,), "both": (True, False)}
    if text not in meant:
        raise SparseMMError(f"{option} is {text!r}: expected yes, no or both")
    return meant[text]


def _list(option: str, text: str | None, kind: Callable[[str], _T]) -> list[_T]:
    try:
        return [kind(each.strip()) for each in (text or "").split(",") if each.strip()]
    except ValueError as error:
        raise SparseMMError(f"{option} {text}: expected numbers with commas between") from error
