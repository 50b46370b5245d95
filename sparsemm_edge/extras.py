"""Packages that only some commands need."""

from collections.abc import Iterator
from contextlib import contextmanager

from sparsemm_edge.errors import SparseMMError


@contextmanager
def needs_torch() -> Iterator[None]:
    """Around an import of `sparsemm_edge.scoring`: what is missing is named, with how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "transformers"):
            raise
        raise SparseMMError(
            f"scoring a checkpoint needs {error.name}, which is not installed:"
            " pip install 'sparsemm-edge[score]'"
        ) from error


@contextmanager
def needs_server() -> Iterator[None]:
    """Around an import of `sparsemm_edge.server`: what is missing is named, with how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "uvicorn", "pydantic", "starlette"):
            raise
        raise SparseMMError(
            f"serving needs {error.name}, which is not installed: pip install 'sparsemm-edge[serve]'"
        ) from error
