"""Run one model and prompt with the full cache and with eviction, each in its own process."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import check_supported, model_shape, sparsemm_metadata
from sparsemm_edge.pictures import open_picture
from sparsemm_edge.profiling import machine as this_machine
from sparsemm_edge.profiling import shapes
from sparsemm_edge.profiling.figures import ModelFigures, SettingFigures, setting_figures
from sparsemm_edge.profiling.jobs import CacheSetting, Task
from sparsemm_edge.profiling.progress import Progress
from sparsemm_edge.profiling.runs import run_worker
from sparsemm_edge.runtime.eviction import Eviction


@dataclass(frozen=True)
class Profile:
    """The results of profile().

    Attributes:
        machine: see machine.machine.
        model: the model.
        scores: where the head scores come from.
        settings: all settings, the full cache first.
    """

    machine: dict[str, Any]
    model: ModelFigures
    scores: str
    settings: list[SettingFigures]

    def to_dict(self) -> dict[str, Any]:
        """The content of profile.json."""
        return asdict(self) | {"settings": [setting.to_dict() for setting in self.settings]}


def profile(
    task: Task, budgets: Sequence[int], progress: Progress, *, n_ubatch: int | None = None
) -> Profile:
    """Run every setting, the full cache first.

    Args:
        task: model, prompt, how much to decode.
        budgets: mean head budgets to evict to; empty: the file's, or the default.
        progress: shows progress.
        n_ubatch: prompt tokens computed at a time in every setting; None: 512.

    Raises:
        SparseMMError: an unsupported model, or no setting could run.
    """
    header = read_header(task.model)
    shape, metadata = model_shape(header), sparsemm_metadata(header)
    check_supported(header, shape)
    for image in task.images:  # a mistake shows at once, not in every process
        open_picture(image)
    if task.mmproj is not None:
        read_header(task.mmproj)
    budgets = list(budgets) or [Eviction().spec(metadata).budget]
    settings = [
        CacheSetting(n_ubatch=n_ubatch),
        CacheSetting(flash_attn=False, n_ubatch=n_ubatch),
        *(CacheSetting(cache_type=kind, n_ubatch=n_ubatch) for kind in ("q8_0", "q4_0")),
        *(CacheSetting(budget, n_ubatch=n_ubatch) for budget in dict.fromkeys(budgets)),
    ]
    with shapes.scores_file(shape, metadata, task.eviction.scores) as (path, source):
        task = replace(task, eviction=replace(task.eviction, scores=path))
        found = [run_and_say(task, setting, progress) for setting in settings]
    check_some_ran(found)
    return Profile(this_machine.machine(), ModelFigures.of(header), source, found)


def run_and_say(task: Task, setting: CacheSetting, progress: Progress) -> SettingFigures:
    """Run one setting, and print a line about it."""
    progress.doing(f"{setting.name}: starting")
    figures = setting_figures(setting, run_worker(task, [setting], progress.phases(f"{setting.name}: ")))
    done = figures.done
    if done is None:
        progress.done(f"{setting.name}: {figures.status}: {figures.reason}")
    else:
        progress.done(
            f"{setting.name}: K and V {done.kv.bytes_now / 2**20:.1f} MiB,"
            f" {done.decode_tps:.1f} tokens/s, peak {figures.rss_peak / 2**20:.0f} MiB"
        )
    return figures


def check_some_ran(settings: Sequence[SettingFigures]) -> None:
    """Raise SparseMMError with the first reason if every setting failed."""
    if not any(setting.status == "ok" for setting in settings):
        raise SparseMMError(f"no setting could be run; {settings[0].name}: {settings[0].reason}")
