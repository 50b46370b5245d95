"""`sparsemm-edge scores show`, `compare` and `knockout`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsemm_edge.commands import options
from sparsemm_edge.output import print_json, print_table, progress_bar

if TYPE_CHECKING:
    from sparsemm_edge.scores import HeadScores

scores = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show, compare and test head scores.",
)

_N_DIFFERENCES = 8  # heads of which compare tells how they differ

ScoresFile = Annotated[Path, typer.Argument(help="Head scores, a JSON file.", show_default=False)]


@scores.command()
def show(
    file: ScoresFile,
    plot: Annotated[Path | None, typer.Option(help="Draw the scores: layers x heads (PNG).")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show how concentrated head scores are, and the top heads.

    \b
    Example:
      sparsemm-edge scores show scores.json --plot scores.png
    """
    from sparsemm_edge.reports.head_map import save_score_map
    from sparsemm_edge.scores import HeadScores

    loaded = HeadScores.load(file)
    if plot:
        save_score_map(loaded.normalised(), plot, title=loaded.model)
    if as_json:
        print_json(to_dict(loaded))
        return
    print_figures(loaded)
    if plot:
        print(f"wrote {plot}")


@scores.command()
def compare(file: ScoresFile, other: ScoresFile, as_json: options.AsJson = False) -> None:
    """Compare two score files of one model: rank correlation, common top heads, differences.

    \b
    Example:
      sparsemm-edge scores compare reading.json scenes.json
    """
    import numpy as np

    from sparsemm_edge.ranking import TOP_SHARES, overlap_of_top, spearman
    from sparsemm_edge.scores import HeadScores

    one, two = HeadScores.load(file), HeadScores.load(other)
    two.check_fits(one.n_layer, one.n_head)
    shares = np.stack([one.normalised().ravel(), two.normalised().ravel()], axis=1)
    most = np.argsort(-np.abs(shares[:, 0] - shares[:, 1]), kind="stable")[:_N_DIFFERENCES]
    report: dict[str, Any] = {
        "kinds": [scores.provenance.get("kind") for scores in (one, two)],
        "spearman": spearman(one.scores, two.scores),
        "top_overlap": {f"{share:g}": overlap_of_top(one.scores, two.scores, share) for share in TOP_SHARES},
        "differences": [
            {**_place(head, one.n_head), "shares": [float(share) for share in shares[head]]} for head in most
        ],
    }
    if as_json:
        print_json(report)
        return
    for path, scores in ((file, one), (other, two)):
        kind, dataset = (scores.provenance.get(key, "not said") for key in ("kind", "dataset"))
        print(f"{path}: kind {kind}, data set {dataset}")
    print(f"rank correlation (Spearman) of {one.scores.size} heads: {report['spearman']:.3f}")
    print_table(
        "heads that both name",
        ["top", "in common"],
        [[f"{float(share):.0%}", f"{common:.0%}"] for share, common in report["top_overlap"].items()],
    )
    print_table(
        "heads that differ most, and their part of the score",
        ["head", "one", "other"],
        [
            [f"{each['layer']}-{each['head']}", *(f"{share:.1%}" for share in each["shares"])]
            for each in report["differences"]
        ],
    )


@scores.command()
@options.as_command
def knockout(
    model: Annotated[
        str, typer.Argument(metavar="HF_MODEL", help="The scored checkpoint.", show_default=False)
    ],
    file: Annotated[Path, typer.Option("--scores", help="Its head scores, a JSON file.", show_default=False)],
    data: Annotated[str, typer.Option(help="Pages to read: documents, grid or a folder.")] = "documents",
    pages: Annotated[int, typer.Option(help="How many pages, at most.")] = 20,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of the pages and of the random heads.")] = 1,
    size: options.PageSize = "896x672",
    prompt: Annotated[str | None, typer.Option(help="What to ask [default: for all the text].")] = None,
    share: Annotated[float, typer.Option(help="Share of the heads to silence.")] = 0.05,
    draws: Annotated[int, typer.Option(help="Random choices of as many other heads.")] = 5,
    max_new_tokens: options.MaxNewTokens = None,
    device: Annotated[str | None, typer.Option(help="As for score.")] = None,
    dtype: Annotated[str, typer.Option(help="As for score.")] = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Measure reading accuracy with all heads, without the top heads, and without random others.

    Random heads are drawn from outside the top. The pages have another seed than those scored.

    \b
    Example:
      sparsemm-edge scores knockout path/to/checkpoint --scores scores.json
    """
    from sparsemm_edge.extras import needs
    from sparsemm_edge.pages.readers import open_pages, page_size
    from sparsemm_edge.scores import HeadScores

    with needs("score"):
        from sparsemm_edge.scoring.knockout import knockout as run
        from sparsemm_edge.scoring.models import load

    loaded = HeadScores.load(file)
    source = open_pages(data, pages, seed=seed, size=page_size(size))
    reader = load(model, device=device, dtype=dtype)
    with progress_bar("reading pages") as progress:
        result = run(
            reader,
            loaded,
            source,
            question=prompt,
            share=share,
            n_draws=draws,
            seed=seed,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    n_silenced, n_heads = result.n_heads
    mean = sum(result.random) / len(result.random)
    if as_json:
        print_json(
            {
                "n_pages": result.n_pages,
                "n_heads": n_heads,
                "n_silenced": n_silenced,
                "character_accuracy": {
                    "all_heads": result.none,
                    "without_top": result.top,
                    "without_random": result.random,
                    "without_random_mean": mean,
                },
            }
        )
        return
    print_table(
        f"character accuracy on {result.n_pages} pages, {source.name}",
        ["silenced", "accuracy"],
        [
            ["none", f"{result.none:.1%}"],
            [f"top {n_silenced} of {n_heads} heads", f"{result.top:.1%}"],
            *([f"{n_silenced} others, draw {i}", f"{value:.1%}"] for i, value in enumerate(result.random, 1)),
            [f"{n_silenced} others, mean", f"{mean:.1%}"],
        ],
    )


def to_dict(scores: "HeadScores") -> dict[str, Any]:
    """The figures of one file of head scores."""
    from sparsemm_edge.ranking import TOP_SHARES, held_by_top, top_heads

    shares = scores.normalised().ravel()
    return {
        "model": scores.model,
        "n_layer": scores.n_layer,
        "n_head": scores.n_head,
        "n_head_kv": scores.n_head_kv,
        "held_by_top": {f"{share:g}": held_by_top(scores.scores, share) for share in TOP_SHARES},
        "top_heads": [
            {**_place(head, scores.n_head), "share": float(shares[head])}
            for head in top_heads(scores.scores, 0.05)
        ],
        **scores.provenance,
    }


def _place(head: int, n_head: int) -> dict[str, int]:
    """The layer of a head, and its number there."""
    return {"layer": int(head) // n_head, "head": int(head) % n_head}


def print_figures(scores: "HeadScores") -> None:
    """The figures of one file of head scores as text, with the convergence of the ranking if it is known."""
    report = to_dict(scores)
    kv = "" if scores.n_head_kv is None else f", {scores.n_head_kv} KV heads"
    lines = {"model": f"{scores.model}, {scores.n_layer} layers x {scores.n_head} heads{kv}"}
    if "dataset" in report:
        lines["read"] = str(report["dataset"])
    if "n_pages" in report:
        lines["pages"] = str(report["n_pages"]) + (
            f", {report['n_pages_unread']} of them unread" if report.get("n_pages_unread") else ""
        )
    if "n_tokens_scored" in report:
        lines["tokens"] = f"{report['n_tokens_scored']} scored of {report.get('n_tokens', '?')}"
    if "character_accuracy" in report:
        lines["accuracy"] = f"{report['character_accuracy']:.1%} of the characters read right"
    if "things_named" in report:
        lines["accuracy"] = f"{report['things_named']:.1%} of the things asked for named"
    lines["best heads"] = ", ".join(
        f"{head['layer']}-{head['head']} ({head['share']:.1%})" for head in report["top_heads"][:8]
    )
    for name, text in lines.items():
        print(f"{name + ':':<14}{text}")
    print_table(
        "concentration",
        ["heads", "of the score"],
        [[f"top {float(share):.0%}", f"{held:.1%}"] for share, held in report["held_by_top"].items()],
    )
    steps = report.get("convergence")
    if isinstance(steps, list) and steps:
        print_table(
            "how well halves agree",
            ["pages", "rank correlation", "top 5 % shared"],
            [
                [str(step["n_pages"]), f"{step['spearman']:.3f}", f"{step['top_overlap']:.0%}"]
                for step in steps
            ],
        )
