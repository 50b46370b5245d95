"""`sparsemm-edge profile`."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from sparsemm_edge.commands import options
from sparsemm_edge.output import print_json, print_table, whole_numbers


def profile(
    loaded: options.ModelOptions,
    asked: options.QuestionOptions,
    framed: options.TemplateOptions,
    image: options.Images = None,
    budgets: Annotated[
        str,
        typer.Option(help="Budgets to evict to, such as 64,256 [default: the file's].", show_default=False),
    ] = "",
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Tokens to decode.")] = 32,
    n_ubatch: options.NUbatch = None,
    scores: options.Scores = None,
    policy: options.Policy = None,
    window: options.Window = None,
    vote: options.Vote = None,
    residual: options.Residual = None,
    kv_max_tail: options.KvMaxTail = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("sparsemm-profile"),
    as_json: options.AsJson = False,
) -> None:
    """Measure memory and time of full, quantised and evicted caches, each in its own process.

    Writes profile.json, a self-contained profile.html and PNG pictures into a folder.

    \b
    Example:
      sparsemm-edge profile -m llava.sparsemm.gguf --mmproj mmproj.gguf --image page.png --budgets 64,256
    """
    from sparsemm_edge.image_urls import image_file
    from sparsemm_edge.profiling.jobs import Task
    from sparsemm_edge.profiling.machine import in_words
    from sparsemm_edge.profiling.profile import profile as measure
    from sparsemm_edge.profiling.progress import Progress
    from sparsemm_edge.reports import html
    from sparsemm_edge.reports import profile as profile_report
    from sparsemm_edge.runtime import Eviction

    wanted = whole_numbers("--budgets", budgets)
    question, frame, loading = asked.text("What does the image show?"), framed.arguments(), loaded.loading()
    html.make_folder(out)
    with TemporaryDirectory() as folder, Progress() as progress:
        task = Task(
            model=loaded.model,
            mmproj=loaded.mmproj,
            images=tuple(image_file(each, Path(folder)) for each in image or []),
            prompt=question,
            frame=frame,
            n_predict=n_predict,
            n_threads=loaded.threads,
            loading=loading,
            eviction=Eviction(True, policy, None, window, scores, kv_max_tail, vote, residual),
        )
        found = measure(task, wanted, progress, n_ubatch=n_ubatch)
    profile_report.write(out, found)
    if as_json:
        print_json(found.to_dict())
        return
    table = profile_report.screen_table(found.settings)
    print_table(f"{found.model.name}; {in_words(found.machine)}", table.columns, table.rows)
    for line in profile_report.first_tokens(found.settings):
        print(line)
    print(f"head scores: {found.scores}")
    print(f"wrote {out / 'profile.html'}")
