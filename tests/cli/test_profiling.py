"""Claims about `profile` and `bench`, on small models: what they measure, and what survives a mishap."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from helpers.command_line import CommandLine
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import read_header, weight_bytes
from sparsemm_edge.gguf_metadata import model_shape
from sparsemm_edge.output import whole_numbers
from sparsemm_edge.profiling import bench, profile, shapes
from sparsemm_edge.profiling.figures import Spread, samples, setting_figures
from sparsemm_edge.profiling.fit import fit
from sparsemm_edge.profiling.jobs import CacheSetting, Event, Task
from sparsemm_edge.profiling.memory import MemoryTrace, watch_memory
from sparsemm_edge.profiling.progress import Progress
from sparsemm_edge.profiling.runs import Run, run_worker
from sparsemm_edge.reports import profile as profile_report
from sparsemm_edge.reports import profiling_plots
from sparsemm_edge.runtime import Eviction, VisionModel
from sparsemm_edge.runtime.context import context_for
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.first_token import FirstToken, Part
from sparsemm_edge.scores import HeadScores

SMALL = replace(shapes.SHAPES["llava-1.5-7b"], n_layer=2, n_embd=1024, n_ff=64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.model_of_shape("small", SMALL, tmp_path_factory.mktemp("models"))


@pytest.fixture
def llava_task(models: Callable[[str], Any], tmp_path: Path) -> Task:
    """A page for the LLaVA test model."""
    from helpers.models import sample_image

    files = models("llava")
    page = tmp_path / "page.png"
    sample_image(files.image_size, seed=1).save(page)
    return Task(
        files.gguf(),
        files.mmproj(),
        (page,),
        "What does the page say?",
        n_predict=4,
        n_threads=1,
    )


def measure(task: Task, budgets: list[int]) -> profile.Profile:
    with Progress() as progress:
        return profile.profile(task, budgets, progress)


def test_profile_runs_every_setting_and_fit_says_the_same_bytes(llava_task: Task, tmp_path: Path) -> None:
    found = measure(llava_task, [48, 64])
    content = found.to_dict()

    settings = {setting["name"]: setting for setting in content["settings"]}
    assert list(settings) == [
        "full",
        "full, no flash attention",
        "full, q8_0",
        "full, q4_0",
        "evicted, budget 48",
        "evicted, budget 64",
    ]
    assert {setting["status"] for setting in settings.values()} == {"ok"}
    n_prompt = settings["full"]["n_prompt"]
    said = fit(
        llava_task.model,
        llava_task.mmproj,
        ((112, 112),),
        n_text=n_prompt - 64,
        n_predict=llava_task.n_predict,
        budget=48,
    ).to_dict()
    assert said["n_prompt"] == n_prompt
    for row in said["rows"]:
        measured = settings[row["name"]]
        assert (row["kv"], row["kv_peak"]) == (measured["kv"]["bytes_now"], measured["kv"]["bytes_peak"])
        sizes = measured["breakdown"]
        assert row["compute"] == sizes["compute"] + sizes["hidden"] + sizes["output"]
        # the file's mapping is logged with what lies between its tensors, those among it of which llama.cpp
        # makes a copy that suits the processor (AMX takes f16)
        assert row["weights"] == pytest.approx(sizes["weights_mapped"], rel=0.01)

    for setting in settings.values():
        phases = [phase["name"] for phase in setting["phases"]]
        assert phases[0] == "load" and phases[-1] == "decode"
        assert "image" in phases and "prompt" in phases
        assert ("eviction" in phases) == (setting["budget"] is not None)
        ends = [phase["end"] for phase in setting["phases"]]
        assert ends == sorted(ends)
        first = setting["first_token"]
        assert first["vision"]["ms"] == setting["image_ms"] and first["prompt"]["ms"] == setting["prompt_ms"]
        assert sum(first[part]["ms"] for part in ("images", "vision", "prompt", "token")) < first["total_ms"]
        memory = setting["memory"]
        assert len({len(values) for values in memory.values()}) == 1
        assert setting["rss_peak"] >= max(memory["rss"]) > 2**20
        assert setting["decode_ms"]["low"] <= setting["decode_ms"]["median"] <= setting["decode_ms"]["high"]

    profile_report.write(tmp_path, found)
    assert json.loads((tmp_path / "profile.json").read_text()) == json.loads(json.dumps(content))
    lines = profile_report.first_tokens(found.settings)
    assert [line.partition(": first token after ")[0] for line in lines] == [
        "full",
        "evicted, budget 48",
        "evicted, budget 64",
    ]


def test_the_page_needs_nothing_but_itself(llava_task: Task, tmp_path: Path) -> None:
    profile_report.write(tmp_path, measure(replace(llava_task, n_predict=2), [48]))

    page = (tmp_path / "profile.html").read_text()
    sources = re.findall(r'<img [^>]*src="([^"]{30})', page)
    assert len(sources) == 3
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "http:" not in page and "https:" not in page and "<script" not in page and "<link" not in page
    assert 'name="viewport"' in page
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"profile.html", "profile.json", "memory-over-time.png", "memory-peak.png", "speed.png"}


def test_a_setting_that_is_killed_is_reported_and_the_others_go_on(
    llava_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_and_kill(task: Task, settings: list[CacheSetting], listen: Callable[[Event], None]) -> Any:
        def kill(event: Event) -> None:
            if settings[0].cache_type == "q8_0" and event.get("name") == "prompt":
                os.kill(event["pid"], signal.SIGKILL)

        return run_worker(task, settings, kill)

    monkeypatch.setattr(profile, "run_worker", run_and_kill)
    found = measure(llava_task, [48])

    assert [setting.status for setting in found.settings] == ["ok", "ok", "killed", "ok", "ok"]
    killed = found.settings[2]
    assert "SIGKILL" in killed.reason and "memory ran out: close other programs" in killed.reason
    assert killed.rss_peak > 2**20 and killed.phases and killed.done is None
    profile_report.write(tmp_path, found)
    assert "killed" in (tmp_path / "profile.html").read_text()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
def test_a_setting_that_is_refused_memory_says_so(small: Path) -> None:
    def limit(event: Event) -> None:
        if event.get("name") == "load":
            most = psutil.Process(event["pid"]).memory_info().vms + 300 * 2**20
            resource.prlimit(event["pid"], resource.RLIMIT_AS, (most, most))

    # without flash attention the attention of 3000 positions to 3000 is a matrix for each head: over a GB
    unfused = CacheSetting(flash_attn=False, n_ubatch=3000)
    run = run_worker(Task(small, n_prompt=3000, n_threads=1), [unfused], limit)

    assert run.status == "out of memory"
    assert "llama.cpp cannot make a context" in run.reason


def test_a_mistake_that_no_setting_survives_is_an_error(small: Path) -> None:
    with pytest.raises(SparseMMError, match="no setting could be run; full: "):
        measure(Task(small, prompt="Hello", n_threads=1, n_predict=10**6), [])


def test_a_phase_is_not_too_short_to_be_told() -> None:
    times = {"load": 10.0, "context": 11.0, "image": 11.1, "prompt": 12.5, "decode": 12.9995, "end": 13.0}
    said: list[Event] = [{"event": "phase", "name": name, "t": t} for name, t in times.items()]

    phases = Run("ok", "", 9.0, 14.0, said).phases()

    assert [phase.name for phase in phases] == ["load", "context", "image", "prompt", "decode"]
    assert [phase.start for phase in phases] == pytest.approx([1, 2, 2.1, 3.5, 3.9995])
    assert [phase.end for phase in phases] == pytest.approx([2, 2.1, 3.5, 3.9995, 4])


def test_a_worker_that_cannot_start_is_a_failed_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))

    run = run_worker(Task(Path("model.gguf"), n_prompt=10), [CacheSetting()])

    assert (run.status, run.reason) == ("failed", "ended with exit code 3: no such luck")
    figures = setting_figures(CacheSetting(), run)
    assert figures.phases == [] and figures.measured is None
    assert profiling_plots.svg(profiling_plots.memory_over_time([figures]))


def test_a_worker_does_not_outlive_who_asked(small: Path) -> None:
    job = (Task(small, n_prompt=1500, n_threads=1), [CacheSetting()], 0)
    worker = subprocess.Popen(
        [sys.executable, "-m", "sparsemm_edge.profiling.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert worker.stdin is not None and worker.stdout is not None
    pickle.dump(job, worker.stdin)
    worker.stdin.flush()
    assert pickle.load(worker.stdout)["event"] == "phase"

    worker.stdin.close()

    assert worker.wait(timeout=60) == 1


def test_memory_of_another_process_is_seen_from_outside() -> None:
    size = 80 * 2**20
    code = f"import time; block = bytearray({size}); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with watch_memory(process.pid) as trace:
            time.sleep(0.2)
        process.kill()

    assert size < trace.rss_peak < size + 60 * 2**20
    assert len(trace.t) == len(trace.rss) == len(trace.anon) > 1
    if sys.platform == "linux":
        assert size < (trace.peak("anon") or 0) <= trace.rss_peak
        assert (trace.peak("pss") or 0) > size


def test_a_run_that_is_over_before_the_next_sample_still_has_memory() -> None:
    trace = MemoryTrace(t=[9.98, 10.06], rss=[50, 80], anon=[20, None], rss_peak=80)

    assert samples(trace, 10.0, 0.05) == {"t": [0.0], "rss": [50], "anon": [20]}
    assert samples(trace, 9.0, 2.0) == {"t": [0.98, 1.06], "rss": [50, 80], "anon": [20, None]}


def test_the_peak_of_a_process_is_not_that_of_who_started_it() -> None:
    ballast = bytearray(os.urandom(2**20) * 300)
    code = "from sparsemm_edge.runtime.process import rss_peak_bytes as peak; print(peak())"
    alone = int(subprocess.check_output([sys.executable, "-c", code]))

    assert 2**20 < alone < len(ballast)


def test_bench_prints_one_object_whose_figures_agree(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparsemm: CommandLine
) -> None:
    monkeypatch.setattr("sparsemm_edge.profiling.machine._BYTES", 2**22)
    lengths = ("--n-prompt", "120,60", "--budgets", 48, "--rounds", 1, "--threads", 1)

    content = sparsemm("bench", "-m", small, *lengths, "--out", tmp_path, "--json").report

    assert content["machine"]["memory_bandwidth"] > 0
    assert [(row["n_prompt"], row["budget"]) for row in content["rows"]] == [(120, 48), (60, 48)]
    for row, length in zip(content["rows"], content["lengths"], strict=True):
        both = (row["decode_tps_full_flash_attn"], row["decode_tps_full_no_flash_attn"])
        assert row["decode_tps_full"] == max(both)
        assert row["decode_ratio"] == row["decode_tps"] / row["decode_tps_full"]
        assert row["decode_limit_ratio"] == row["decode_tps_depth_0"] / row["decode_tps_full"]
        assert row["decode_limit_share"] == pytest.approx(row["decode_ratio"] / row["decode_limit_ratio"])
        # each of 32 heads keeps 48 of the positions on average, of keys and values of 32 numbers of 2 bytes
        position = 2 * 32 * 2 * 32 * 2
        assert row["kv_bytes_full"] == position * (row["n_prompt"] + 16)
        assert position * (48 + 16) <= row["kv_bytes"] < position * (48 + 64 + 32)
        assert row["kv_bytes"] <= row["kv_bytes_peak"]
        assert row["rss_peak"] > row["kv_bytes_peak"] and row["anon_peak"] <= row["rss_peak"]
        assert row["memory_setting"].startswith("full")
        # both processes are alike but for what llama.cpp allocated
        unexplained = row["memory_difference"] - row["memory_difference_allocated"]
        assert abs(unexplained) < 8 * 2**20
        assert row["prompt_tps"] > 0 and row["prompt_tps_full"] > 0
        shape = model_shape(read_header(small))
        plain = length["settings"][0]["kv"]["bytes_now"]
        # rounded up to 256 places
        assert plain == shape.n_layer * shape.n_head_kv * shape.kv_bytes(256)
        assert length["interleaved_status"] == "ok"
        if sys.platform == "linux":
            # K and V alone are measured to be there, and gone when they were evicted
            assert 0 < row["kv_bytes_peak"] <= row["peak_over_weights"] < row["anon_peak"]
            assert row["after_over_weights"] <= row["peak_over_weights"]
        assert length["limits"]["weight_bytes"] < content["model"]["weight_bytes"]
    page = (tmp_path / "bench.html").read_text()
    assert page.count("<img ") == 2 + 2 * 2
    assert "of the limit" in page


def test_a_machine_that_is_slow_for_a_while_does_not_change_a_ratio() -> None:
    def turn(number: int, setting: str, ms: float) -> Event:
        return {
            "setting": setting,
            "against": "full",
            "round": 0,
            "turn": number,
            "decode_ms": [ms, ms, 9 * ms],
        }

    slow = (1.0, 1.0, 7.0, 1.0, 3.0)
    turns = [turn(number, "full", 30 * by) for number, by in enumerate(slow)]
    turns += [turn(number, "evicted", 20 * by) for number, by in enumerate(slow)]

    found = bench._interleaved(turns, "full")

    assert found["evicted"].ratio == Spread(1.5, 1.5, 1.5)
    assert found["evicted"].tps / found["full"].tps == pytest.approx(1.5)
    assert bench._interleaved(turns, "full, q8_0") == {}


def test_memory_alone_is_measured_without_rounds(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparsemm: CommandLine
) -> None:
    monkeypatch.setattr("sparsemm_edge.profiling.machine._BYTES", 2**22)
    command = ("bench", "-m", small, "--n-prompt", 2048, "--budgets", 48, "--rounds", 0, "--threads", 1)

    said = sparsemm(*command, "--out", tmp_path)

    assert said.status == 0 and "MiB over the weights at the peak" in said.out
    content = json.loads((tmp_path / "bench.json").read_text())
    ((row,), (length,)) = content["rows"], content["lengths"]
    assert [setting["name"] for setting in length["settings"]] == ["full", "evicted, budget 48"]
    assert row["decode_tps"] is None and length["against"] == {} and row["prompt_tps"] > 0
    if sys.platform == "linux":
        # 2 layers of 32 heads: 32 MiB for 2304 cells, which stay; eviction leaves one of 40
        full, evicted = length["settings"]
        assert full["after_over_weights"] > 0.95 * full["kv"]["bytes_now"]
        assert evicted["after_over_weights"] < full["after_over_weights"] / 2


def test_a_shape_becomes_a_model_of_that_shape_and_size(tmp_path: Path) -> None:
    # 64 words more than the vocabulary has
    sizes = {"n_layer": 1, "n_embd": 896, "n_ff": 96, "rope_sections": (4, 6, 6, 0)}
    shape = replace(shapes.SHAPES["qwen2-vl-7b"], **sizes, vocab="llama-spm", n_vocab=32064)
    shares: list[float] = []
    path = shapes.model_of_shape("q", shape, tmp_path, shares.append)

    header = read_header(path)
    assert model_shape(header) == replace(
        shape.model_shape("q, 1 layers, random weights"), n_head=28, n_head_kv=4
    )
    assert weight_bytes(path) == shape.weight_bytes()
    assert shares == sorted(shares) and shares[-1] == 1
    assert header.tensors["token_embd.weight"].shape == (896, 32064)
    # made once
    assert shapes.model_of_shape("q", shape, tmp_path) == path
    assert len(list(tmp_path.iterdir())) == 1


def test_a_shape_is_not_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shapes.model_of_shape("small", SMALL, tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(SparseMMError, match=r"the disk has 0\.0 GiB free"):
        shapes.model_of_shape("small", SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_more_than_memory_holds_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "machine_memory", lambda: (2**33, 2**30))
    with pytest.raises(SparseMMError, match=r"3\.5 GiB, 1\.0 GiB of memory are available.*--layers"):
        bench.check_memory(shapes.SHAPES["llava-1.5-7b"].weight_bytes())


@pytest.mark.parametrize(
    ("name", "billions", "kv_per_position"),
    [
        ("llava-1.5-7b", 6.74, 524288),
        ("llava-1.5-13b", 13.02, 819200),
        ("llava-next-mistral-7b", 7.24, 131072),
        ("qwen2-vl-2b", 1.54, 28672),
        ("qwen2-vl-7b", 7.62, 57344),
        ("qwen2.5-vl-3b", 3.09, 36864),
        ("qwen3-vl-2b", 1.72, 114688),
        ("qwen3-vl-4b", 4.02, 147456),
        ("qwen3-vl-8b", 8.19, 147456),
        ("internvl3.5-8b", 8.19, 147456),
        ("glm-4.1v-9b", 9.40, 40960),
        ("smolvlm2-2.2b", 1.81, 196608),
        ("qwen3.5-4b", 4.21, 32768),
        ("qwen3.5-9b", 8.95, 32768),
        ("gemma-3-4b", 3.88, 20480),
    ],
)
def test_shapes_have_the_published_sizes(name: str, billions: float, kv_per_position: int) -> None:
    shape = shapes.SHAPES[name]

    n_weights = sum(int(np.prod(dims)) for dims in shape.tensors().values())

    assert n_weights / 1e9 == pytest.approx(billions, abs=0.006)
    of_model = shape.model_shape(name)
    assert of_model.n_layer * of_model.n_head_kv * of_model.kv_bytes(256) == kv_per_position * 256


def test_the_help_names_every_shape(sparsemm: CommandLine) -> None:
    shown = "".join(sparsemm("bench", "--help").out.split())  # a name may be cut at a hyphen
    assert [name for name in shapes.SHAPES if name not in shown] == []


NAMES = ["qwen3-vl-8b", "internvl3.5-8b", "glm-4.1v-9b", "smolvlm2-2.2b", "qwen3.5-9b", "gemma-3-4b"]


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_reads_a_model_of_every_architecture(name: str, tmp_path: Path) -> None:
    """A few layers of each, with its real heads: it loads, decodes, and its cache is as large as computed."""
    cut = replace(shapes.SHAPES[name], n_layer=8, n_ff=64, n_vocab=32064, vocab="llama-spm")
    if cut.n_embd == cut.n_head * cut.head_dim:  # as small as the heads allow
        cut = replace(cut, n_embd_head=cut.head_dim, n_embd=256)
    with VisionModel.load(shapes.model_of_shape(name, cut, tmp_path), n_threads=1) as model:
        assert model.shape == cut.model_shape(model.shape.name)
        with (
            model.tokenize("one two three") as prompt,
            context_for(model, prompt, n_predict=1, n_ctx=256, eviction=Eviction(enabled=False)) as context,
        ):
            context.prefill(encode(model, prompt))
            assert np.isfinite(context.logits()).all()
            full = model.shape.n_layer * model.shape.n_head_kv * model.shape.kv_bytes(256)
            assert context.kv_stats().bytes_now == full


def test_made_up_scores_are_as_concentrated_as_published_ones() -> None:
    published = HeadScores.load(shapes.PUBLISHED_SCORES)
    shape = shapes.SHAPES["qwen2-vl-7b"].model_shape("q")

    scores, source = shapes.head_scores(shape)

    assert scores.scores.shape == (28, 28) and "synthetic" in source
    for share in (0.05, 0.1, 0.2):
        tops = [
            np.sort(s.normalised().ravel())[::-1][: round(s.scores.size * share)].sum()
            for s in (published, scores)
        ]
        assert tops[0] == pytest.approx(tops[1], abs=0.06)

    cut = shapes.SHAPES["llava-1.5-7b"].model_shape("v")
    scores, source = shapes.head_scores(replace(cut, n_layer=8))
    assert "published" in source and "first 8 layers" in source
    assert (scores.scores == published.scores[:8]).all()


@pytest.mark.parametrize("text", ["a", "1,,2", "0", "-3", "1.5"])
def test_lists_of_numbers_are_checked(text: str) -> None:
    assert whole_numbers("--budgets", " 64, 256 ") == [64, 256]
    with pytest.raises(SparseMMError, match="--budgets"):
        whole_numbers("--budgets", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of -m MODEL.gguf and --shape NAME"),
        (["--shape", "gpt-5"], "unknown shape 'gpt-5': expected one of llava-1.5-7b"),
        (["--shape", "llava-1.5-7b", "--layers", "33"], "has 32 layers"),
        (["-m", "x.gguf", "--layers", "3"], "--layers cuts a --shape"),
        (["--shape", "llava-1.5-7b", "--n-prompt", "many"], "--n-prompt is 'many'"),
    ],
)
def test_bench_names_mistakes_in_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sparsemm: CommandLine,
) -> None:
    monkeypatch.chdir(tmp_path)

    assert message in sparsemm("bench", *options).refusal


def test_a_part_that_reads_weights_as_fast_as_memory_gives_them_is_limited_by_it() -> None:
    gb = 10**9
    assert Part(100, 2, weight_bytes=gb).limit(12e9) == "memory bandwidth"  # 10 GB/s
    assert Part(1000, 2, weight_bytes=gb).limit(12e9) == "compute"  # 1 GB/s
    assert Part(100, 2).limit(12e9) == Part(100, 2).limit(None) == "compute"  # it reads no weights
    assert Part(100, 2, weight_bytes=gb).limit(None) is None
    assert Part().limit(12e9) is None

    first = FirstToken(400, images=Part(20), prompt=Part(100, 2, gb)).with_opening(30)
    assert first.in_words(12e9) == (
        "first token after 430 ms: images decoded and resized 50 ms (limited by compute, 1 thread), prompt"
        " 100 ms (limited by memory bandwidth, 2 threads)"
    )
