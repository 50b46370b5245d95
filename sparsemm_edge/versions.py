"""Installed versions of this package and of llama.cpp."""

from sparsemm_edge import __version__
from sparsemm_edge.errors import SparseMMError

LLAMA_CPP_PYTHON, LLAMA_CPP_COMMIT = "0.3.36", "0c1e57098"
"""The release that the patches are for (patches/pin.json), and the commit of llama.cpp in it."""


def versions() -> list[str]:
    """One line per version."""
    return [f"sparsemm-edge {__version__}", _llama_cpp()]


def _llama_cpp() -> str:
    try:
        from sparsemm_edge.runtime import library
    except SparseMMError as error:
        return f"llama.cpp: {error}"
    import llama_cpp

    version = str(llama_cpp.__version__)
    known = version.partition("+")[0] == LLAMA_CPP_PYTHON
    commit = LLAMA_CPP_COMMIT if known else f"not {LLAMA_CPP_COMMIT}, which the patches are for"
    try:
        library.require_patched()
    except SparseMMError as error:
        return f"llama.cpp {commit}, in llama-cpp-python {version}: {error}"
    return f"llama.cpp {commit}, patched, in llama-cpp-python {version}"
