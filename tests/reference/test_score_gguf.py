"""Scores of a GGUF file: what its heads attend to in llama.cpp is what the checkpoint's do in PyTorch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.command_line import CommandLine
from helpers.interrupt import HOW, stop
from helpers.paths import ROOT
from helpers.vision_models import letters_folder, letters_page
from sparsemm_edge import SparseMMError
from sparsemm_edge.demo import DemoModel
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import sparsemm_metadata
from sparsemm_edge.pages.readers import open_pages
from sparsemm_edge.ranking import convergence, spearman
from sparsemm_edge.runtime.context import Context
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.scores import HeadScores
from sparsemm_edge.scoring import gguf, run
from sparsemm_edge.scoring.run import ScoringJob, score
from sparsemm_edge.scoring.sources import Checkpoint, GgufFiles
from sparsemm_edge.scoring.target_response import Reader, score_page

FILES = DemoModel()
N_NEW = 20


@contextmanager
def both(files: Any, outtype: str = "f32") -> Iterator[tuple[Reader, Reader]]:
    """A test model as llama.cpp runs it, and as PyTorch does."""
    source = GgufFiles(files.gguf(outtype), files.mmproj(outtype), n_threads=1)
    with source.reader() as ours, Checkpoint(str(files.hf), "cpu").reader() as theirs:
        yield ours, theirs


@pytest.mark.parametrize("name", ["llava", "llava-gqa", "llava-siglip", "qwen2vl"])
def test_hits_are_those_of_the_checkpoint(name: str, models: Callable[[str], Any]) -> None:
    files = models(name)
    hits = 0.0
    with both(files) as (ours, theirs):
        for shape in ("n_layer", "n_head", "n_head_kv"):
            assert getattr(ours, shape) == getattr(theirs, shape)
        for seed in range(3):
            page = letters_page((files.image_size, files.image_size), seed)
            got, expected = (score_page(reader, page, "read", N_NEW) for reader in (ours, theirs))
            assert got.answer == expected.answer
            assert (got.n_tokens, got.n_scored) == (expected.n_tokens, expected.n_scored)
            np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-12)
            hits += got.scores.sum()
    assert hits > 0


@pytest.mark.parametrize("n_ubatch", [64, 1000])
def test_every_strongest_position_is_that_of_the_checkpoint(
    n_ubatch: int, models: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not it is a hit; of a prompt in one batch, and in several, of which the last one counts.

    The oracle is eager attention over the whole sequence. What differs are near ties.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    monkeypatch.setattr(gguf, "N_UBATCH", n_ubatch)
    files = models("llava-gqa")
    page = letters_page((files.image_size, files.image_size))
    question = "read " * 40
    with both(files) as (ours, theirs):
        got = ours.read(question, page.image, 6)
        inputs = theirs.prompt(question, page.image).inputs  # type: ignore[attr-defined]
    eager = AutoModelForImageTextToText.from_pretrained(
        files.hf, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.cat([inputs["input_ids"], torch.tensor([got.tokens[:-1]])], dim=1)
    with torch.no_grad():
        whole = eager(
            **(inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}), output_attentions=True
        )
    rows = slice(inputs["input_ids"].shape[1] - 1, None)
    assert whole.logits[0, rows].argmax(-1).tolist() == got.tokens
    weights = torch.stack([layer[0, :, rows] for layer in whole.attentions]).permute(2, 0, 1, 3).numpy()
    assert got.strongest.shape == weights.shape[:3]
    at_found = np.take_along_axis(weights, got.strongest[..., None], axis=3)[..., 0]
    assert (at_found >= 0.9 * weights.max(axis=3)).all()
    assert (got.strongest == weights.argmax(axis=3)).mean() > 0.98
    assert len(got.image_positions) > 2 * 64 and len(np.unique(got.strongest)) > 10


def test_the_demo_models_scores_are_those_of_its_checkpoint() -> None:
    pages = open_pages("grid", 8, seed=3)
    source, checkpoint = (
        GgufFiles(FILES.model, FILES.mmproj),
        Checkpoint(str(ROOT / "models" / "demo"), "cpu"),
    )
    with source.reader() as ours, checkpoint.reader() as theirs:
        got, expected = (
            [score_page(reader, pages.page(i), pages.prompt) for i in range(pages.n_pages)]
            for reader in (ours, theirs)
        )
    assert [page.answer for page in got] == [page.answer for page in expected]
    assert [page.n_scored for page in got] == [page.n_scored for page in expected]
    tables = [np.array([page.scores for page in pages]) for pages in (got, expected)]
    # a near tie may fall to the neighbour in another order of summation
    assert (tables[0] != tables[1]).mean() < 0.005
    assert spearman(tables[0].sum(axis=0), tables[1].sum(axis=0)) > 0.995


# --- the run ------------------------------------------------------------------------------------------


def job(**changes: Any) -> ScoringJob:
    settings: dict[str, Any] = {
        "source": GgufFiles(FILES.model, FILES.mmproj, n_threads=1),
        "data": "grid",
        "n_pages": 6,
        "seed": 0,
        "size": (896, 672),
        "question": None,
        "max_new_tokens": 24,
    }
    return ScoringJob(**(settings | changes))


def test_an_interrupted_run_goes_on_where_it_stopped_and_in_two_processes(tmp_path: Path) -> None:
    score(job(), tmp_path / "whole.json")
    expected = (tmp_path / "whole.json").read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(job(), tmp_path / "s.json", progress=interrupt)
    other = GgufFiles(FILES.model, FILES.mmproj, chat_template="{{ messages }}")
    with pytest.raises(SparseMMError, match="made with chat_template None, not"):
        score(job(source=other), tmp_path / "s.json", resume=True)
    score(job(), tmp_path / "s.json", resume=True, n_jobs=2)
    assert (tmp_path / "s.json").read_bytes() == expected

    content = json.loads(expected)
    assert content["model"] == FILES.model.stem
    assert content["quantisation"] == ["F16", "F16"]
    assert content["files"] == [FILES.model.name, FILES.mmproj.name]
    assert content["llama_cpp"] == json.loads((ROOT / "patches" / "pin.json").read_text())["llama_cpp_commit"]
    assert "llama-cpp-python" in content["packages"] and "torch" not in content["packages"]


def test_it_stops_where_the_ranking_has_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first number of pages looked at whose halves agree, in any number of processes."""
    monkeypatch.setattr(run, "_FIRST_CHECK", 4)
    monkeypatch.setattr(run, "_CHECK_EVERY", 2)
    score(job(n_pages=10, until=2), tmp_path / "all.json")
    assert HeadScores.load(tmp_path / "all.json").provenance["n_pages"] == 10
    with GgufFiles(FILES.model, FILES.mmproj, n_threads=1).reader() as reader:
        pages = open_pages("grid", 10)
        tables = np.array([score_page(reader, pages.page(i), pages.prompt, 24).scores for i in range(10)])
    agreed = {n: convergence(tables[:n])[-1]["spearman"] for n in (4, 6, 8)}
    settled = max(agreed, key=lambda n: agreed[n])
    assert settled > 4

    for n_jobs in (1, 2):
        out = tmp_path / f"{n_jobs}.json"
        report = score(job(n_pages=10, until=agreed[settled]), out, n_jobs=n_jobs)
        assert report.scores.provenance["n_pages"] == settled
        np.testing.assert_allclose(report.scores.scores, tables[:settled].mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_stopped_run_keeps_what_is_done(how: str, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    out = tmp_path / "s.json"
    partial = tmp_path / "s.json.partial"
    arguments = ["score", FILES.model, "--mmproj", FILES.mmproj, "--data", "grid", "--pages", 500]

    def has_read_a_page(_: object) -> bool:
        return " a page, " in (tmp_path / "errors.txt").read_text()

    assert stop(how, [*arguments, "-t", 1, "--out", out], has_read_a_page, folder=tmp_path)[0] == HOW[how]
    assert not out.exists()
    assert 0 < len(json.loads(partial.read_text())["pages"]) < 500


def test_a_reader_that_was_interrupted_reads_on(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = open_pages("grid", 2)
    prefill = Context.prefill

    def interrupted(*arguments: Any) -> None:
        # the main thread waits for this one by then
        ctrl_c = (threading.main_thread().ident, signal.SIGINT)
        threading.Timer(0.02, signal.pthread_kill, ctrl_c).start()
        prefill(*arguments)

    # what a shell starts in the background inherits that Ctrl-C is ignored
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    with GgufFiles(FILES.model, FILES.mmproj, n_threads=1).reader() as reader:
        before = reader.read(pages.prompt, pages.page(0).image, 200)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Context, "prefill", interrupted)
            reader.read(pages.prompt, pages.page(1).image, 200)
        after = reader.read(pages.prompt, pages.page(0).image, 200)
    assert after.tokens == before.tokens
    np.testing.assert_array_equal(after.strongest, before.strongest)


# --- the command line ---------------------------------------------------------------------------------


def test_a_gguf_file_is_scored_and_converted_without_torch(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.symlink_to(FILES.model)
    blocked = "import sys; sys.modules.update(torch=None, transformers=None)"
    peak = "from sparsemm_edge.runtime.process import rss_peak_bytes; import atexit"
    peak += "; atexit.register(lambda: print(rss_peak_bytes(), file=sys.stderr))"
    command = f"{blocked}; {peak}; from sparsemm_edge.cli import main; main()"
    arguments = [
        model,
        "--mmproj",
        FILES.mmproj,
        "--data",
        "grid",
        "--pages",
        3,
        "--out",
        tmp_path / "s.json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", command, "score", *map(str, arguments), "--convert", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stderr.splitlines()[-1]) < 400 * 2**20
    report = json.loads(done.stdout)
    assert (report["n_pages"], report["quantisation"]) == (3, ["F16", "F16"])
    assert report["character_accuracy"] > 0.9
    metadata = sparsemm_metadata(read_header(Path(report["converted"])))
    assert metadata is not None
    made = HeadScores.load(tmp_path / "s.json")
    np.testing.assert_allclose(metadata.head_scores, made.normalised(), rtol=1e-6)
    assert made.sha256 in metadata.scores_source


def test_what_cannot_be_scored_is_said_in_one_line(tmp_path: Path, sparsemm: CommandLine) -> None:
    out = ("--out", tmp_path / "s.json", "--data", "grid", "--pages", 1)
    vision = ("--mmproj", FILES.mmproj)
    for arguments, said in (
        ((FILES.model,), "give its image encoder with --mmproj"),
        ((FILES.model, *vision, "--dtype", "float16"), "--device and --dtype are for checkpoints"),
        ((tmp_path / "none.gguf", *vision), "none.gguf"),
        ((FILES.model, "--mmproj", FILES.model), "not an image encoder (mmproj)"),
        ((FILES.model, *vision, "--chat-template", "{{"), "chat template"),
        ((ROOT / "models" / "demo", "--convert"), "--mmproj and --convert are for GGUF files"),
        ((FILES.model, *vision, "--until", "0"), "a rank correlation of 0.0: it must be above 0"),
    ):
        failed = sparsemm("score", *arguments, *out)
        assert failed.status == 2, arguments
        assert said in failed.err.splitlines()[-1], failed.err
    assert list(tmp_path.iterdir()) == []
    converted = tmp_path / "m.sparsemm.gguf"
    (tmp_path / "m.gguf").symlink_to(FILES.model)
    converted.write_bytes(b"")
    refused = sparsemm("score", tmp_path / "m.gguf", *vision, "--convert", *out).refusal
    assert "m.sparsemm.gguf exists already" in refused  # before any page is read


def test_weights_that_llama_cpp_does_not_compute_are_not_taken_for_scores(llava: Any) -> None:
    from sparsemm_edge.runtime.attention import StrongestPositions

    attention = StrongestPositions(llava.shape.n_layer, llava.shape.n_head, range(llava.shape.n_layer))
    with (
        llava.tokenize("a b c") as prompt,
        Context(llava, n_ctx=16, flash_attn=True, attention=attention) as context,
    ):
        context.prefill(encode(llava, prompt))
        with pytest.raises(SparseMMError, match="computed no attention weights in layer 0"):
            attention.take()


def test_scores_of_letters_in_a_folder_of_ones_own(models: Callable[[str], Any], tmp_path: Path) -> None:
    """A page that is not square: it is padded, and its boxes lie where the tokens show them."""
    files = models("llava")
    folder = letters_folder(tmp_path / "letters", 2)
    source = GgufFiles(files.gguf(), files.mmproj(), n_threads=1)
    report = score(job(source=source, data=str(folder), n_pages=2), tmp_path / "s.json")
    assert report.scores.provenance["dataset"] == "letters"
    assert report.scores.provenance["n_tokens_scored"] > 0


def test_convert_scores_by_itself_says_how_long_it_takes_and_does_it_once(
    models: Callable[[str], Any], tmp_path: Path, sparsemm: CommandLine
) -> None:
    files = models("llava")
    model = tmp_path / "m.gguf"
    model.symlink_to(files.gguf())
    pages = letters_folder(tmp_path / "letters", 3)
    auto = ("convert", model, "--scores", "auto", "--data", pages, "--json")
    vision = ("--mmproj", files.mmproj())
    assert "give the model's image encoder with --mmproj" in sparsemm(*auto).refusal

    done = sparsemm(*auto, *vision)
    assert done.report["path"] == str(tmp_path / "m.sparsemm.gguf")
    assert "a page, " in done.err and "for all 3, less if the ranking settles before" in done.err
    scores = HeadScores.load(tmp_path / "m.scores.json")
    assert scores.provenance["n_pages"] == 3
    metadata = sparsemm_metadata(read_header(tmp_path / "m.sparsemm.gguf"))
    assert metadata is not None and scores.sha256 in metadata.scores_source

    (tmp_path / "m.scores.json").rename(tmp_path / "kept.json")
    assert "m.sparsemm.gguf exists already" in sparsemm(*auto, *vision).refusal  # before any page is read
    (tmp_path / "kept.json").rename(tmp_path / "m.scores.json")
    again = sparsemm(*auto, "--force")  # nothing to read: no image encoder is needed
    assert again.status == 0 and "scores of an earlier run are used" in again.err


def test_convert_goes_on_with_scores_that_were_begun(
    models: Callable[[str], Any], tmp_path: Path, sparsemm: CommandLine
) -> None:
    files = models("llava")
    model = tmp_path / "m.gguf"
    model.symlink_to(files.gguf())
    pages = letters_folder(tmp_path / "letters", 3)
    begun = ScoringJob(
        GgufFiles(model, files.mmproj(), n_threads=1), str(pages), 100, 0, (896, 672), None, None
    )

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(begun, tmp_path / "m.scores.json", progress=interrupt)
    done = sparsemm("convert", model, "--scores", "auto", "--data", pages, "--mmproj", files.mmproj())
    assert done.status == 0, done.err
    assert HeadScores.load(tmp_path / "m.scores.json").provenance["n_pages"] == 3
    assert not list(tmp_path.glob("*.partial"))
