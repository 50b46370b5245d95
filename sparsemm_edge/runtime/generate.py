"""Generate one answer: a stream of text, then its statistics."""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime.conversation import Conversation, GenerationStats
from sparsemm_edge.runtime.model import VisionModel
from sparsemm_edge.runtime.sampler import Sampling


class Generation(Iterator[str]):
    """A stream of text. Close it if you stop early."""

    def __init__(self, conversation: Conversation, save: Path | None, *asked: Any, **options: Any) -> None:
        """Use generate(). `asked` and `options` are those of Conversation.ask."""
        self._stats: GenerationStats | None = None
        self._pieces = self._read(conversation, save, *asked, **options)

    def __next__(self) -> str:
        return next(self._pieces)

    def _read(
        self, conversation: Conversation, save: Path | None, *asked: Any, **options: Any
    ) -> Generator[str, None, None]:
        with conversation:
            try:
                yield from conversation.ask(*asked, **options)
            finally:
                self._stats = conversation.last_stats
            if save is not None:
                conversation.save(save)

    def close(self) -> None:
        """Stop, and free the context."""
        self._pieces.close()

    def stats(self) -> GenerationStats:
        """Statistics of the answer, once the stream has ended or is closed.

        Raises:
            SparseMMError: nothing was generated yet.
        """
        if self._stats is None:
            raise SparseMMError("nothing was generated yet")
        return self._stats


def generate(
    model: VisionModel,
    prompt: str,
    images: Sequence[str | Path | Image.Image] = (),
    *,
    n_predict: int = 256,
    sampling: Sampling | None = None,
    save_session: Path | None = None,
    load_session: Path | None = None,
    **options: Any,
) -> Generation:
    """Stream the answer to one user message.

    Args:
        model: the model, which must outlive the generation.
        prompt, images, n_predict, sampling: as Conversation.ask takes them.
        save_session: a file to write the conversation to, once the answer is complete.
        load_session: a file of save_session; the message continues that conversation.
        options: the other keyword arguments of Conversation, such as `eviction`, `n_ctx` and `system`.

    Returns:
        An iterator over pieces of text, always whole characters.

    Raises, while it is read:
        SparseMMError: as Conversation.ask.
    """
    conversation = Conversation(model, multi_turn=save_session is not None, resume=load_session, **options)
    return Generation(conversation, save_session, prompt, images, n_predict=n_predict, sampling=sampling)
