"""Write head budgets into a GGUF file: `model.gguf` + scores -> `model.sparsemm.gguf`.

The copy differs from the original in the `sparsemm.*` keys only; stock llama.cpp loads it and ignores them.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import atomic_path
from sparsemm_edge.gguf_copy import Progress, copy_with_fields
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import ModelShape, SparseMMMetadata, check_supported, model_shape
from sparsemm_edge.scores import HeadScores, group_scores


@dataclass(frozen=True)
class Converted:
    """The file that `convert` wrote, its model's shape and the metadata it holds."""

    path: Path
    shape: ModelShape
    metadata: SparseMMMetadata


def check_out(model: Path, out: Path | None, *, force: bool) -> Path:
    """The file that convert writes: `out`, or `<model's stem>.sparsemm.gguf` beside the model.

    Raises:
        SparseMMError: it is the model, or it exists and `force` is not set.
    """
    out = out or model.with_name(f"{re.sub('-00001-of-[0-9]{5}$', '', model.stem)}.sparsemm.gguf")
    if out.exists() and model.exists() and out.samefile(model):
        raise SparseMMError(f"{out} is the model itself; choose another --out")
    if out.exists() and not force:
        raise SparseMMError(f"{out} exists already; --force replaces it")
    return out


def convert(
    model: Path,
    scores: Path,
    out: Path | None = None,
    *,
    spec: BudgetSpec | None = None,
    n_prompt: int = 2944,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Copy a GGUF model, adding head budgets; those of an already converted file are replaced.

    Args:
        model: the text model's GGUF file; of a split model the first one, all parts become one file.
        scores: a head-scores file of this model (see HeadScores.load). Needed by every policy: the scores are
            stored too, so that a runtime can apply another budget.
        out: the file to write; `<model's stem>.sparsemm.gguf` beside the model if None.
        spec: how heads share the cache; None: BudgetSpec's defaults.
        n_prompt: prompt length in positions that the table is water-filled for.
        force: replace `out` if it exists.
        progress: called with the bytes copied and their total.

    Raises:
        SparseMMError: the model or the scores cannot be read or do not go together, the model is not
            supported, an argument is out of its range, or `out` exists or cannot be written.
    """
    header = read_header(model)
    shape = model_shape(header)
    check_supported(header, shape)
    out = check_out(model, out, force=force)
    spec = spec or BudgetSpec()
    if spec.policy == "full":
        raise SparseMMError("policy full evicts nothing: use the model as it is, without converting it")

    head_scores = HeadScores.load(scores)
    head_scores.check_fits(shape.n_layer, shape.n_head, shape.n_head_kv)
    # Through f32, as stored: the same spec with the stored scores gives the stored table.
    stored_scores = head_scores.normalised().astype(np.float32)
    metadata = SparseMMMetadata(
        spec=spec,
        head_budgets=spec.table(group_scores(stored_scores, shape.n_head_kv), shape.kv_heads, n_prompt),
        head_scores=stored_scores,
        scores_source=head_scores.label(),
        water_fill_length=n_prompt if spec.water_fill else 0,
        layers=shape.layers,
    )
    with atomic_path(out) as part:
        copy_with_fields(header, part, metadata.fields(), progress)
    return Converted(out, shape, metadata)
