"""Models to score: a checkpoint in PyTorch, or GGUF files in llama.cpp.

Both are small descriptions, sent to processes that load the model themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gguf.constants import LlamaFileType

from sparsemm_edge.extras import needs
from sparsemm_edge.files import fingerprint
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.resources import usable_cores
from sparsemm_edge.scoring.target_response import Reader
from sparsemm_edge.versions import LLAMA_CPP_COMMIT


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint; needs torch and transformers.

    Attributes:
        name: folder or hub id.
        device, dtype: as models.load takes them.
    """

    name: str
    device: str | None = None
    dtype: str = "auto"

    @property
    def label(self) -> str:
        """Its name in score files."""
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name

    def key(self) -> dict[str, Any]:
        """What must be equal to resume a run."""
        return {"model": self.name, "dtype": self.dtype}

    def provenance(self) -> dict[str, Any]:
        """How the scores were made, for score files."""
        return {"packages": _versions("torch", "transformers", "pillow", "numpy")}

    @contextmanager
    def reader(self, rank: int = 0, n_jobs: int = 1) -> Iterator[Reader]:
        """Load the model; process `rank` of several uses its share of GPUs or cores."""
        with needs("score"):
            import torch

            from sparsemm_edge.scoring.models import load
        device = self.device
        if n_jobs > 1:
            if device in (None, "cuda") and torch.cuda.device_count() > 1:
                device = f"cuda:{rank % torch.cuda.device_count()}"
            torch.set_num_threads(max(1, usable_cores() // n_jobs))
        yield load(self.name, device=device, dtype=self.dtype)


@dataclass(frozen=True)
class GgufFiles:
    """A text model and its image encoder for llama.cpp.

    Attributes:
        model, mmproj: GGUF files.
        n_threads: None: the physical cores.
        n_threads_batch, n_gpu_layers, image_min_tokens, image_max_tokens: as in Loading.
        chat_template: instead of the model's own.
    """

    model: Path
    mmproj: Path
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int | None = None
    image_min_tokens: int | None = None
    image_max_tokens: int | None = None
    chat_template: str | None = None

    @property
    def label(self) -> str:
        """Its name in score files."""
        return self.model.stem

    def key(self) -> dict[str, Any]:
        """What must be equal to resume a run."""
        return {
            "model": fingerprint(self.model),
            "mmproj": fingerprint(self.mmproj),
            "image_tokens": [self.image_min_tokens, self.image_max_tokens],
            "chat_template": self.chat_template,
        }

    def provenance(self) -> dict[str, Any]:
        """How the scores were made, for score files."""
        return {
            "files": [self.model.name, self.mmproj.name],
            "quantisation": [_quantisation(self.model), _quantisation(self.mmproj)],
            "llama_cpp": LLAMA_CPP_COMMIT,
            "packages": _versions("llama-cpp-python", "pillow", "numpy"),
        }

    @contextmanager
    def reader(self, rank: int = 0, n_jobs: int = 1) -> Iterator[Reader]:
        """Load the model; each of several processes uses its share of the cores."""
        from sparsemm_edge.runtime import Loading, VisionModel
        from sparsemm_edge.scoring.gguf import GgufReader

        n_threads = self.n_threads or max(1, usable_cores() // n_jobs)
        loading = Loading(
            n_threads_batch=self.n_threads_batch,
            n_gpu_layers=self.n_gpu_layers,
            image_min_tokens=self.image_min_tokens,
            image_max_tokens=self.image_max_tokens,
        )
        with VisionModel.load(self.model, self.mmproj, n_threads=n_threads, loading=loading) as model:
            yield GgufReader(model, self.mmproj, self.chat_template)


Source = Checkpoint | GgufFiles


def _quantisation(path: Path) -> str:
    """The quantisation of a GGUF file, such as Q4_0; "unknown" if the file does not say."""
    value = read_header(path).value("general.file_type")
    try:
        return LlamaFileType(value).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "unknown"


def _versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}
