"""`sparsemm-edge chat`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemm_edge import defaults
from sparsemm_edge.commands import options
from sparsemm_edge.errors import SparseMMError


def chat(
    loaded: options.ModelOptions,
    sampled: options.SamplingOptions,
    framed: options.TemplateOptions,
    kept: options.ConversationOptions,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Image for the first message, or its URL; may be given several times."
        ),
    ] = None,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Most tokens of an answer.")] = 512,
    n_ctx: options.NCtxOfChat = None,
    image_memory: options.ImageMemory = defaults.IMAGE_MEMORY,
    verbose: options.Verbose = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print text and figures of each answer as one JSON object a line.")
    ] = False,
) -> None:
    """Chat about images. Earlier messages and images stay in the KV cache and are not computed again.

    Each message that leaves a head above its budget triggers another eviction. /help lists the commands.

    \b
    Examples:
      sparsemm-edge chat -m llava.sparsemm.gguf --mmproj mmproj.gguf --image page.png
      echo "What is written here?" | sparsemm-edge chat -m llava.sparsemm.gguf --mmproj mm.gguf --image a.png
    """
    from sparsemm_edge.chat import Chat
    from sparsemm_edge.image_urls import open_image
    from sparsemm_edge.runtime import Conversation

    frame, sampling = framed.arguments(), sampled.sampling()
    system = frame.pop("system")
    images = [open_image(each) for each in image or []]
    if images and loaded.mmproj is None:
        raise SparseMMError("an image needs the model's image encoder: give its file with --mmproj")
    with loaded.load(show_log=verbose, image_memory=image_memory, kept=kept) as model:

        def begin(system: str | None, resume: Path | None) -> Conversation:
            return Conversation(
                model,
                n_ctx=min(model.n_ctx_train, defaults.N_CTX) if n_ctx is None else n_ctx,
                system=system,
                **frame,
                **kept.conversation(),
                resume=resume,
            )

        with Chat(begin, system, images, sampling, n_predict, as_json) as chat:
            chat.run()
