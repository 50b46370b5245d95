"""Image embeddings in memory, by image content, so that a repeated image is not encoded again."""

from collections import OrderedDict
from threading import Lock

import numpy as np
import numpy.typing as npt

ImageKey = tuple[bytes, int]
"""A picture's content, hashed, and which of the tiles that llama.cpp cuts it into."""


class ImageStore:
    """Embeddings of one model's images; the least recently used ones are dropped over the limit.

    Attributes:
        max_bytes: size limit; 0 keeps none.
        n_bytes: present size.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._held: OrderedDict[ImageKey, npt.NDArray[np.float32]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: ImageKey) -> npt.NDArray[np.float32] | None:
        """The embeddings, read-only: [n_tokens, n_embd_inp]; None if they are not here."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key]

    def put(self, key: ImageKey, embeddings: npt.NDArray[np.float32]) -> None:
        """Keep embeddings, which must not be changed afterwards, if they fit at all."""
        if embeddings.nbytes > self.max_bytes:
            return
        with self._lock:
            if key in self._held:
                return
            embeddings.flags.writeable = False
            self._held[key] = embeddings
            self.n_bytes += embeddings.nbytes
            while self.n_bytes > self.max_bytes:
                _, dropped = self._held.popitem(last=False)
                self.n_bytes -= dropped.nbytes
