"""SparseMM Edge: visual-head KV-cache eviction for llama.cpp.

    GGUF or HF checkpoint --score--> scores.json --convert--> model.gguf with head budgets
                                                                |
    image + prompt + mmproj.gguf --generate--> patched llama.cpp evicts per head

Method: SparseMM (arXiv 2506.05344). Importing this package imports neither torch nor llama_cpp; only
`sparsemm_edge.scoring` imports the first and only `sparsemm_edge.runtime` the second (`server` its types).
"""

from sparsemm_edge.errors import SparseMMError

__all__ = ["SparseMMError", "__version__"]

__version__ = "0.1.0"
