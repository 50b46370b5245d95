"""`sparsemm-edge generate`."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge.commands import options
from sparsemm_edge.output import print_json


def generate(
    loaded: options.ModelOptions,
    asked: options.QuestionOptions,
    framed: options.TemplateOptions,
    sampled: options.SamplingOptions,
    kept: options.ConversationOptions,
    image: options.Images = None,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Most tokens to generate.")] = 256,
    n_ctx: Annotated[
        int | None,
        typer.Option("--n-ctx", "-c", help="Context size in positions [default: as prompt and reply need]."),
    ] = None,
    save_session: Annotated[
        Path | None, typer.Option(help="Write the conversation to this file, to continue it later.")
    ] = None,
    load_session: Annotated[
        Path | None, typer.Option(help="Continue the conversation in this file, without reading it again.")
    ] = None,
    verbose: options.Verbose = False,
    as_json: options.AsJson = False,
) -> None:
    """Answer a question about images, with the eviction settings of the converted model file.

    \b
    Examples:
      sparsemm-edge generate -m llava.sparsemm.gguf --mmproj mmproj.gguf --image page.png -p "What is this?"
      sparsemm-edge generate -m llava.gguf --scores llava.head-scores.json --budget 128 -p "Hello"
      sparsemm-edge generate -m llava.sparsemm.gguf --load-session page.session -p "And what is below it?"
    """
    from sparsemm_edge.image_urls import open_image
    from sparsemm_edge.runtime import generate as answering

    question, frame = asked.text(), framed.arguments()
    started = time.perf_counter()
    images = [open_image(each) for each in image or []]
    opening_ms = (time.perf_counter() - started) * 1000 if images else 0.0
    sampling = sampled.sampling()
    text = ""
    with loaded.load(show_log=verbose, kept=kept) as model:
        answer = answering(
            model,
            question,
            images,
            n_predict=n_predict,
            sampling=sampling,
            n_ctx=n_ctx,
            **frame,
            **kept.conversation(),
            save_session=save_session,
            load_session=load_session,
        )
        for piece in answer:
            text += piece
            if not as_json:
                print(piece, end="", flush=True)
        stats = answer.stats()
        stats = replace(stats, first_token=stats.first_token.with_opening(opening_ms))
    if as_json:
        print_json(stats.to_dict(text))
    else:
        print()
        per_token = stats.timings.decode_ms_per_token
        speed = f"; {per_token:.1f} ms a token" if per_token is not None else ""
        print(f"[KV cache {stats.kv.in_words()}{speed}]", file=sys.stderr)
