"""The command line: arguments in, one call, tables out.

Commands import what they need when they run, so that `convert --help` does not load a model library.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm_edge import __version__, defaults
from sparsemm_edge.errors import SparseMMError

# Rich's boxes would break a one-line error into a picture, and help texts hold examples to be copied.
app = typer.Typer(
    name="sparsemm-edge",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparsemm-edge {__version__}")
        raise typer.Exit()


@app.callback()
def _app(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Visual-head KV-cache eviction for llama.cpp: same answers about images, a fraction of the cache."""


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="The text model, a GGUF file.", show_default=False)],
    scores: Annotated[Path, typer.Option(help="Head scores of this model, a JSON file.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="File to write [default: <model>.sparsemm.gguf beside the model].")
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Positions a KV head keeps on average, window included.")
    ] = defaults.BUDGET,
    window: Annotated[
        int, typer.Option(help="Last prompt positions, which vote and are always kept.")
    ] = defaults.WINDOW,
    floor_ratio: Annotated[
        float, typer.Option(help="Share of the budget that every head gets.")
    ] = defaults.FLOOR_RATIO,
    policy: Annotated[
        str, typer.Option(help="How heads share: sparsemm, uniform, pyramid or random.")
    ] = "sparsemm",
    water_fill: Annotated[
        bool,
        typer.Option("--water-fill/--no-water-fill", help="Give what a head cannot use to the others."),
    ] = True,
    n_prompt: Annotated[int, typer.Option(help="Prompt length to water-fill for, in positions.")] = 2944,
    seed: Annotated[int, typer.Option(help="Seed of policy random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the file to write if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Write head budgets into a copy of a GGUF model.

    Stock llama.cpp loads the copy too and ignores them. Converting a converted file replaces its budgets.

    \b
    Example:
      sparsemm-edge convert llava-7b.gguf --scores llava-7b.head-scores.json --budget 256
    """
    from sparsemm_edge.convert import convert as convert_model
    from sparsemm_edge.inspection import figures

    done = convert_model(
        model,
        scores,
        out,
        budget=budget,
        window=window,
        floor_ratio=floor_ratio,
        policy=policy,
        water_fill=water_fill,
        n_prompt=n_prompt,
        seed=seed,
        force=force,
    )
    report = figures(done.shape, done.metadata)
    if as_json:
        _print_json({"path": str(done.path), "sparsemm": report})
    else:
        print(f"wrote {done.path}")
        _print_figures(report)


@app.command()
def mmproj(
    hf_dir: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="Folder of a LLaVA checkpoint.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("mmproj.gguf"),
    outtype: Annotated[str, typer.Option(help="Type of the matrices: f16 or f32.")] = "f16",
    force: Annotated[bool, typer.Option("--force", help="Replace the file to write if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Write the image encoder of a LLaVA-1.5 or LLaVA-NeXT checkpoint as mmproj.gguf.

    The text model of the same checkpoint is converted by llama.cpp's convert_hf_to_gguf.py.

    \b
    Example:
      sparsemm-edge mmproj llava-1.5-7b-hf --out mmproj.gguf
    """
    from sparsemm_edge.mmproj import convert_mmproj

    done = convert_mmproj(hf_dir, out, outtype=outtype, force=force)
    if as_json:
        _print_json(
            {
                "path": str(done.path),
                "tower": done.tower,
                "n_layer": done.n_layer,
                "feature_layers": list(done.feature_layers),
                "image_size": done.image_size,
                "n_image_tokens": done.n_image_tokens,
                "bytes": done.size,
            }
        )
    else:
        print(f"wrote {done.path}: {done.size / 2**20:.1f} MiB")
        print(
            f"{done.tower}, {done.n_layer} layers; {done.image_size} x {done.image_size} pixels "
            f"become {done.n_image_tokens} tokens"
        )


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the head map as a picture: layers x KV heads (PNG).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Show the head budgets that a GGUF file holds, and what they save.

    \b
    Example:
      sparsemm-edge inspect llava-7b.sparsemm.gguf --plot head-map.png
    """
    from sparsemm_edge.gguf_header import read_header
    from sparsemm_edge.gguf_metadata import model_shape, sparsemm_metadata
    from sparsemm_edge.inspection import figures, kv_bytes

    header = read_header(model)
    metadata = sparsemm_metadata(header)
    if metadata is None:
        if plot:
            raise SparseMMError(f"{model} holds no sparsemm metadata, so there is no head map to draw")
        if as_json:
            _print_json({"path": str(model), "sparsemm": None})
        else:
            print(f"{model} holds no sparsemm metadata: llama.cpp keeps its whole KV cache.")
        return

    shape = model_shape(header)
    report = figures(shape, metadata)
    saved = kv_bytes(shape, metadata)
    if plot:
        from sparsemm_edge.plot import save_head_map

        save_head_map(
            metadata.head_budgets, plot, title=f"{shape.name}: {metadata.policy}, budget {metadata.budget}"
        )
    if as_json:
        _print_json({"path": str(model), "sparsemm": report, "kv_bytes": saved})
    else:
        _print_figures(report)
        _print_kv_bytes(saved)
        if plot:
            print(f"wrote {plot}")


@app.command()
def generate(
    model: Annotated[Path, typer.Option("--model", "-m", help="The text model, a GGUF file.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask.")],
    mmproj: Annotated[Path | None, typer.Option(help="Its image encoder, a GGUF file.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image that the question is about; may be given several times.")
    ] = None,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Most tokens to generate.")] = 256,
    temp: Annotated[float, typer.Option(help="0: the likeliest token; above: sample.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    n_ctx: Annotated[
        int | None, typer.Option(help="Most positions of prompt and reply [default: what they need].")
    ] = None,
    n_ubatch: Annotated[
        int | None, typer.Option(help="Prompt tokens computed at a time [default: the whole prompt].")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads [default: the physical cores].")] = None,
    cache_type_k: Annotated[str, typer.Option(help="Numbers of K: f16, f32, bf16 or q8_0.")] = "f16",
    cache_type_v: Annotated[str, typer.Option(help="Numbers of V: f16, f32, bf16 or q8_0.")] = "f16",
    budget: Annotated[
        int | None, typer.Option(help="Positions a KV head keeps on average, instead of the file's budget.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="sparsemm, uniform, pyramid, random or full, instead of the file's.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Last prompt positions, which vote and are kept, instead of the file's."),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Head scores to use instead of the file's, a JSON file.")
    ] = None,
    evict: Annotated[bool, typer.Option("--evict/--no-evict", help="Evict, or keep the whole cache.")] = True,
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja text or file to use instead of the model's chat template.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show llama.cpp's log.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print text and figures as one JSON object.")
    ] = False,
) -> None:
    """Answer a question about images, evicting as the converted model file says.

    \b
    Examples:
      sparsemm-edge generate -m llava.sparsemm.gguf --mmproj mmproj.gguf --image page.png -p "What is this?"
      sparsemm-edge generate -m llava.gguf --scores llava.head-scores.json --budget 128 -p "Hello"
    """
    from sparsemm_edge.runtime import Eviction, VisionModel
    from sparsemm_edge.runtime.chat_template import read_template

    template = None if chat_template is None else read_template(chat_template)
    text = ""
    with VisionModel.load(model, mmproj, n_threads=threads, show_log=verbose) as loaded:
        for piece in loaded.generate(
            prompt,
            image or [],
            n_predict=n_predict,
            temperature=temp,
            seed=seed,
            n_ctx=n_ctx,
            n_ubatch=n_ubatch,
            cache_type_k=cache_type_k,
            cache_type_v=cache_type_v,
            chat_template=template,
            eviction=Eviction(evict, policy, budget, window, scores),
        ):
            text += piece
            if not as_json:
                print(piece, end="", flush=True)
        stats = loaded.stats()
    if as_json:
        _print_json(stats.figures(text))
    else:
        print()
        kv, per_token = stats.kv, stats.timings.decode_ms_per_token
        print(
            f"[KV cache {kv.bytes_now / 2**20:.1f} MiB of {kv.bytes_full / 2**20:.1f} MiB unevicted;"
            f" {kv.positions_kept_mean:.0f} of {stats.n_prompt + stats.n_generated} positions a head"
            + (f"; {per_token:.1f} ms a token]" if per_token is not None else "]"),
            file=sys.stderr,
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page, the model files and the head map.")] = Path(
        "sparsemm-demo"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Read a rendered page with the full cache and with eviction, side by side.

    \b
    Example:
      sparsemm-edge demo
    """
    from sparsemm_edge.demo import run, show

    report = run(out)
    if as_json:
        _print_json(report)
    else:
        show(report)


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2))


def _print_figures(report: dict[str, Any]) -> None:
    """The figures of one converted model, a line each."""
    table = report["head_budgets"]
    length = report["water_fill_length"]
    lines = {
        "model": f"{report['name']} ({report['architecture']}), {report['n_layer']} layers,"
        f" {report['n_head']} query heads, {report['n_head_kv']} KV heads",
        "policy": report["policy"]
        + ("" if report["enabled"] else ", switched off (sparsemm.enabled = false)"),
        "budget": f"{report['budget']} positions per KV head on average, window {report['window']};"
        f" floor ratio {report['floor_ratio']:g}",
        "water-filled": f"for a prompt of {length} positions" if length else "no",
        "head budgets": f"min {table['min']}, median {table['median']:g}, max {table['max']};"
        f" {table['heads_at_floor']:.1%} of the KV heads at the floor",
        "scores": report["scores_source"],
    }
    for name, text in lines.items():
        print(f"{name + ':':<14}{text}")


def _print_kv_bytes(saved: dict[str, dict[int, int]]) -> None:
    """KV bytes per policy and prompt length, as MiB and as a share of the full cache."""
    from rich.console import Console
    from rich.table import Table

    full = saved["full"]
    table = Table(title="K and V after the prompt, f16", title_justify="left")
    table.add_column("policy")
    for n_prompt in full:
        table.add_column(f"{n_prompt} positions", justify="right")
    for row, cells in saved.items():
        table.add_row(row, *(f"{size / 2**20:.1f} MiB {size / full[n]:7.1%}" for n, size in cells.items()))
    Console().print(table)


def main() -> None:
    """Run the command line. A user's mistake becomes one line on stderr and exit status 2."""
    try:
        app()
    except SparseMMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
