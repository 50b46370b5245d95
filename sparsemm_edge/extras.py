"""Packages that only some commands need."""

from collections.abc import Iterator
from contextlib import contextmanager

from sparsemm_edge.errors import SparseMMError

_EXTRAS = {
    "score": ("scoring a checkpoint", ("torch", "transformers")),
    "serve": ("serving", ("fastapi", "uvicorn", "pydantic", "starlette")),
}


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around an import of what an extra of the package installs: names what is missing, and how to get it."""
    what, packages = _EXTRAS[extra]
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in packages:
            raise
        raise SparseMMError(
            f"{what} needs {error.name}, which is not installed: pip install 'sparsemm-edge[{extra}]'"
        ) from error
