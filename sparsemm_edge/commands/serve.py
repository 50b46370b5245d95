"""`sparsemm-edge serve`."""

from dataclasses import dataclass
from types import FrameType
from typing import Annotated

import typer

from sparsemm_edge import defaults
from sparsemm_edge.commands import options
from sparsemm_edge.errors import SparseMMError


@dataclass(frozen=True)
class ServeSampling(options.SamplingOptions):
    """How an answer is sampled where a request says nothing."""

    seed: options.Seed = -1


def serve(
    loaded: options.ModelOptions,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.")] = 8080,
    *,
    framed: options.TemplateOptions,
    sampled: ServeSampling,
    kept: options.ConversationOptions,
    n_predict: Annotated[
        int | None, typer.Option("--n-predict", "-n", help="Most tokens of an answer [default: what fits].")
    ] = None,
    n_ctx: options.NCtxOfChat = None,
    image_memory: options.ImageMemory = defaults.IMAGE_MEMORY,
    verbose: options.Verbose = False,
) -> None:
    """Serve OpenAI's chat API, with images as data URLs and streaming, one request at a time.

    The options are the defaults for requests. A request that continues the last conversation computes only
    what is new; `usage` holds the bytes of K and V. Needs: pip install 'sparsemm-edge[serve]'.

    \b
    Examples:
      sparsemm-edge serve -m llava.sparsemm.gguf --mmproj mmproj.gguf --port 8080
      curl localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
          -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    import socket

    from sparsemm_edge.extras import needs
    from sparsemm_edge.runtime import Conversation

    with needs("serve"):
        import uvicorn

        from sparsemm_edge.server import Slot, make_app

    frame, sampling = framed.arguments(), sampled.sampling()
    system = frame.pop("system")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SparseMMError(f"cannot listen at {host}, port {port}: {reason}") from error
        with (
            loaded.load(show_log=verbose, image_memory=image_memory, kept=kept) as model,
            Conversation(
                model,
                n_ctx=(n_ctx := min(model.n_ctx_train, defaults.N_CTX) if n_ctx is None else n_ctx),
                **frame,
                **kept.conversation(),
            ) as conversation,
        ):
            conversation.check(sampling)
            with Slot(conversation, sampling=sampling, n_predict=n_predict or n_ctx, system=system) as slot:
                app = make_app(slot, loaded.model.stem)
                at = f"{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
                config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
                listening.listen()  # before the line below, so that its readers can connect
                print(f"serving {loaded.model.name} at http://{at}/v1", flush=True)
                server = uvicorn.Server(config)
                on_exit = server.handle_exit

                def stop(number: int, frame: FrameType | None) -> None:
                    slot.stop()  # or uvicorn would wait for the end of the answer
                    on_exit(number, frame)

                server.handle_exit = stop  # type: ignore[method-assign, assignment]
                server.run([listening])
