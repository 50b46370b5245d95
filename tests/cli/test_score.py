"""`score`: in one process or two, at once or resumed, the scores are the same; mistakes are one line."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.command_line import CommandLine
from helpers.paths import PUBLISHED_SCORES
from helpers.vision_models import letters_folder, make
from sparsemm_edge import SparseMMError
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.convert import convert
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import sparsemm_metadata
from sparsemm_edge.pages import Chunk, Page, documents
from sparsemm_edge.pages.readers import open_pages
from sparsemm_edge.scores import HeadScores
from sparsemm_edge.scoring import run
from sparsemm_edge.scoring.knockout import knockout, silenced
from sparsemm_edge.scoring.models import load
from sparsemm_edge.scoring.run import ScoringJob, score
from sparsemm_edge.scoring.sources import Checkpoint
from sparsemm_edge.scoring.target_response import reading_accuracy

torch.set_num_threads(1)

N_PAGES = 5


@cache
def checkpoint() -> str:
    return str(make("llava", Path(mkdtemp()) / "tiny"))


@cache
def letters() -> str:
    return str(letters_folder(Path(mkdtemp()) / "letters", N_PAGES))


def job(**changes: object) -> ScoringJob:
    source = {"name": checkpoint(), "device": "cpu", "dtype": "auto"}
    source = {key: changes.pop("model" if key == "name" else key, value) for key, value in source.items()}
    settings: dict[str, object] = {
        "source": Checkpoint(**source),  # type: ignore[arg-type]
        "data": letters(),
        "n_pages": N_PAGES,
        "seed": 0,
        "size": (896, 672),
        "question": None,
        "max_new_tokens": 24,
    }
    return ScoringJob(**(settings | changes))  # type: ignore[arg-type]


@cache
def expected() -> bytes:
    out = Path(mkdtemp()) / "s.json"
    score(job(), out)
    return out.read_bytes()


# --- the scores ---------------------------------------------------------------------------------------


def test_scores_are_the_mean_over_pages_and_say_how_they_were_made() -> None:
    content = json.loads(expected())
    assert (content["n_layer"], content["n_head"], content["n_head_kv"]) == (3, 4, 2)
    assert content["model"] == "tiny"
    assert content["n_pages"] == N_PAGES
    assert 0 < content["n_tokens_scored"] <= content["n_tokens"] <= 24 * N_PAGES
    assert content["dataset"] == "letters"
    assert content["prompt"] == documents.PROMPT
    assert {"torch", "transformers"} <= set(content["packages"])
    assert content["created_by"].startswith("sparsemm-edge ")

    model, pages = load(checkpoint(), device="cpu"), open_pages(letters(), N_PAGES)
    each = [run.score_page(model, pages.page(i), documents.PROMPT, 24) for i in range(N_PAGES)]
    np.testing.assert_allclose(content["scores"], np.mean([page.scores for page in each], axis=0), rtol=1e-12)
    assert content["n_tokens_scored"] == sum(page.n_scored for page in each)


def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    score(job(), tmp_path / "two.json", n_jobs=2)
    assert (tmp_path / "two.json").read_bytes() == expected()
    assert [path.name for path in tmp_path.iterdir()] == ["two.json"]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "s.json"

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(job(), out, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["s.json.partial"]

    with pytest.raises(SparseMMError, match=r"s\.json\.partial holds an unfinished run: go on with --resume"):
        score(job(), out)
    with pytest.raises(SparseMMError, match=r"made with question .*, not 'What'"):
        score(job(question="What"), out, resume=True)

    seen: list[int] = []
    score(job(), out, resume=True, progress=lambda done, total: seen.append(done))
    assert seen == [3, 4, 5]
    assert out.read_bytes() == expected()
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": {"n_layer": 3, "n_head": 4}}, "is no partial result"),
        ({"shape": {"n_layer": 10**9, "n_head": 4, "n_head_kv": 2}}, "is no partial result"),
        ({"shape": {"n_layer": 3, "n_head": 9, "n_head_kv": 3}}, "was made with a model of another shape"),
        ({"pages": {"first": {}}}, "is no partial result"),
        ({"pages": {"0": {"scores": [[0, 4, 1.0]]}}}, "is no partial result"),  # there is no head 4
        ({"pages": {"0": {"scores": [[0, 0, float("nan")]]}}}, "is no partial result"),
        ({"pages": {"0": {"scores": [[0, 0]]}}}, "is no partial result"),
        ({"pages": {"0": {"accuracy": None}}}, "is no partial result"),
        ({"pages": {"0": {"n_scored": -1}}}, "is no partial result"),
    ],
)
def test_a_damaged_unfinished_run_is_not_gone_on_with(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    page = {"name": "p", "n_tokens": 3, "n_scored": 1, "accuracy": 0.5, "scores": [[0, 1, 0.5]]}
    shape = {"n_layer": 3, "n_head": 4, "n_head_kv": 2}
    content = {"key": job().key(), "shape": shape, "pages": {"0": page}} | changes
    if "0" in content["pages"]:
        content["pages"] = {"0": page | content["pages"]["0"]}
    partial = tmp_path / "s.json.partial"
    partial.write_text(json.dumps(content))
    with pytest.raises(SparseMMError, match=said):
        score(job(), tmp_path / "s.json", resume=True)
    assert partial.read_text() == json.dumps(content)


def test_resuming_a_finished_run_with_more_pages_only_reads_the_new_ones(tmp_path: Path) -> None:
    out = tmp_path / "s.json"

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(job(n_pages=2), out, progress=interrupt)
    seen: list[int] = []
    score(job(), out, resume=True, progress=lambda done, total: seen.append(done))
    assert seen == [2, 3, 4, 5]
    assert out.read_bytes() == expected()


def test_what_is_done_is_saved_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SAVE_EVERY", -1.0)
    out = tmp_path / "s.json"
    saved: list[int] = []

    def look(done: int, total: int) -> None:
        partial = tmp_path / "s.json.partial"
        saved.append(len(json.loads(partial.read_text())["pages"]) if partial.exists() else 0)

    score(job(), out, progress=look)
    assert saved == [0, 0, 1, 2, 3, 4]


def test_files_that_are_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    out.write_text("mine")
    with pytest.raises(SparseMMError, match=r"s\.json exists: choose another --out, or"):
        score(job(), out)
    assert out.read_text() == "mine"
    score(job(), out, force=True)
    assert out.read_bytes() == expected()
    with pytest.raises(SparseMMError, match="nothing to resume"):
        score(job(), tmp_path / "t.json", resume=True)
    (tmp_path / "t.json.partial").write_text("{}")
    with pytest.raises(SparseMMError, match="is no partial result"):
        score(job(), tmp_path / "t.json", resume=True)
    with pytest.raises(SparseMMError, match="there is no directory"):
        score(job(), tmp_path / "none" / "t.json")


def test_a_scores_file_made_here_feeds_convert(models: Callable[[str], object], tmp_path: Path) -> None:
    model = models("llava-gqa")
    score(job(model=str(model.hf), n_pages=3), tmp_path / "s.json")  # type: ignore[attr-defined]
    convert(model.gguf(), tmp_path / "s.json", tmp_path / "c.gguf", spec=BudgetSpec().override(budget=64))  # type: ignore[attr-defined]
    metadata = sparsemm_metadata(read_header(tmp_path / "c.gguf"))
    assert metadata is not None
    made = HeadScores.load(tmp_path / "s.json")
    np.testing.assert_allclose(metadata.head_scores, made.normalised(), rtol=1e-6)
    assert made.sha256 in metadata.scores_source


def test_an_answer_that_names_nothing_on_the_page_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    said = "".join(chr(code) for code in range(33, 127))
    records = []
    for name, text in (("readable.png", said), ("foreign.png", "日本語")):
        Image.new("RGB", (120, 120), "white").save(folder / name)
        records.append({"image": name, "chunks": [{"text": text, "box": [0, 0, 120, 120]}]})
    (folder / "pages.json").write_text(json.dumps(records))
    report = score(job(data=str(folder)), tmp_path / "s.json")
    assert report.unread == ["foreign.png"]
    assert report.scores.provenance["n_pages_unread"] == 1
    n_scored = report.scores.provenance["n_tokens_scored"]
    assert any(f"only {n_scored} tokens were scored, fewer than" in warning for warning in report.warnings)

    (folder / "pages.json").write_text(json.dumps(records[1:]))
    with pytest.raises(SparseMMError, match="named nothing that stands on any of 1 pages"):
        score(job(data=str(folder)), tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_an_error_in_a_process_is_the_parents_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(checkpoint(), broken)
    (broken / "preprocessor_config.json").unlink()
    with pytest.raises(SparseMMError, match="cannot load the image processor"):
        score(job(model=str(broken)), tmp_path / "s.json", n_jobs=2)


# --- what cannot be scored ----------------------------------------------------------------------------


def test_a_folder_is_read_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load(checkpoint()).n_layer == 3


def _copy(tmp_path: Path, changes: dict[str, object] | None = None, without: str | None = None) -> str:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    if without:
        (folder / without).unlink()
    if changes:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def test_what_is_no_scorable_checkpoint_is_said_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text(json.dumps({"model_type": "llama"}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "blip-2"}))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for name, reason in (
        (str(tmp_path / "missing"), "there is no folder"),
        (str(file), "is a file: scoring takes the folder of a Hugging Face checkpoint"),
        (str(tmp_path), "it holds no config.json"),
        (str(text), "reads no images (model type 'llama'): scored can be llava, llava_next, llava_onevision"),
        (str(other), "model type 'blip-2' cannot be scored yet; scored can be llava, llava_next"),
        (_copy(tmp_path / "a", without="preprocessor_config.json"), "cannot load the image processor"),
        (_copy(tmp_path / "b", without="tokenizer.json"), "cannot load the tokenizer"),
        (_copy(tmp_path / "c", without="model.safetensors"), "cannot load the weights"),
        (_copy(tmp_path / "d", {"image_token_index": 9999}), "its tokenizer has no image token (id 9999)"),
    ):
        with pytest.raises(SparseMMError) as caught:
            load(name)
        assert reason in str(caught.value), name
        assert "\n" not in str(caught.value)
    config = json.loads((Path(checkpoint()) / "config.json").read_text())
    for part, n_layer, reason in (
        ("text_config", 2**31, "in config.json, layers of llama is 2147483648: it must be 1 to 1000"),
        ("vision_config", 2**31, "in config.json, layers of clip_vision_model is 2147483648"),
        ("text_config", 0, "layers of llama is 0"),
        # not answered for with random weights
        ("text_config", 4, "9 tensors of the text model are missing, such as model.language_model.layers.3."),
    ):
        shape = {part: config[part] | {"num_hidden_layers": n_layer}}
        with pytest.raises(SparseMMError, match=re.escape(reason)):
            load(_copy(tmp_path / f"{part}-{n_layer}", shape))
    with pytest.raises(SparseMMError, match="unknown dtype 'int3': expected one of auto, float32"):
        load(checkpoint(), dtype="int3")
    with pytest.raises(SparseMMError, match="device 'abacus' cannot be used"):
        load(checkpoint(), device="abacus")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_every_text_file_of_a_checkpoint_may_be_as_an_editor_saved_it(encoding: str, tmp_path: Path) -> None:
    """transformers reads most of them by itself, and plain UTF-8 only."""
    folder = Path(_copy(tmp_path))
    load(checkpoint()).model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja")]
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config", "model.safetensors.index"):
        assert folder / f"{name}.json" in files
    assert {folder / "preprocessor_config.json", folder / "chat_template.jinja"} <= set(files)
    for path in files:
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    score(job(model=str(folder)), tmp_path / "s.json")
    found, wanted = (json.loads(data) for data in ((tmp_path / "s.json").read_bytes(), expected()))
    assert (found["model"], found["scores"]) == ("model", wanted["scores"])
    assert found["character_accuracy"] == wanted["character_accuracy"]


def test_what_is_wrong_with_such_a_checkpoint_is_said_of_its_own_folder(tmp_path: Path) -> None:
    folder = Path(_copy(tmp_path, without="model.safetensors"))
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    with pytest.raises(SparseMMError) as caught:
        load(str(folder))
    assert "cannot load the weights" in str(caught.value) and str(folder) in str(caught.value)
    assert "sparsemm-edge-" not in str(caught.value)
    config.write_bytes("{".encode("utf-16") + b"\0")
    with pytest.raises(SparseMMError, match=r"config\.json: not a text file \(UTF-16 was expected"):
        load(str(folder))


def test_a_model_without_chat_template_takes_a_whole_prompt(tmp_path: Path) -> None:
    model = load(_copy(tmp_path, without="chat_template.jinja"))
    page = open_pages("grid", 1).page(0).image
    with pytest.raises(SparseMMError, match="has no chat template: give the whole prompt, with <image>"):
        model.prompt("read", page)
    with pytest.raises(SparseMMError, match="must hold <image> once, not 2"):
        model.prompt("<image><image>read", page)
    whole = load(checkpoint()).prompt("read", page)
    same = model.prompt("USER: <image>\nread ASSISTANT:", page)
    assert torch.equal(whole.inputs["input_ids"], same.inputs["input_ids"])


def test_auto_devices_give_the_same_scores_or_ask_for_accelerate(tmp_path: Path) -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        with pytest.raises(SparseMMError, match="needs accelerate, which is not installed"):
            load(checkpoint(), device="auto")
        return
    score(job(device="auto"), tmp_path / "s.json")
    assert (tmp_path / "s.json").read_bytes() == expected()


# --- knockout -----------------------------------------------------------------------------------------


def test_a_silenced_head_is_one_whose_output_is_cut_off() -> None:
    model, cut = load(checkpoint()), load(checkpoint())
    page = open_pages("grid", 1).page(0)
    prompt = model.prompt("read", page.image)
    heads = np.array([1, 2, 9])  # layer 0: heads 1 and 2; layer 2: head 1
    with torch.no_grad():
        before = model.model(**prompt.inputs).logits
        with silenced(model, heads):
            got = model.model(**prompt.inputs).logits
        after = model.model(**prompt.inputs).logits
        for head in heads:
            columns = slice(head % 4 * 16, head % 4 * 16 + 16)
            cut.attentions[head // 4].o_proj.weight[:, columns] = 0
        wanted = cut.model(**prompt.inputs).logits
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(got, before)
    assert torch.equal(before, after)


def test_knockout_silences_the_top_heads_and_as_many_others() -> None:
    model = load(checkpoint())
    table = np.ones((3, 4))
    table[1, 2] = 9
    scores = HeadScores("tiny", table, n_head_kv=2)
    result = knockout(model, scores, open_pages("grid", 2), n_draws=3, max_new_tokens=8)
    assert (result.n_heads, result.n_pages, len(result.random)) == ((1, 12), 2, 3)
    assert all(0 <= value <= 1 for value in (result.none, result.top, *result.random))
    with pytest.raises(SparseMMError, match="the scores do not fit the model"):
        knockout(model, HeadScores("other", np.ones((3, 8))), open_pages("grid", 1))
    with pytest.raises(SparseMMError, match="the share of heads is 0"):
        knockout(model, scores, open_pages("grid", 1), share=0)


def test_reading_accuracy_is_one_minus_the_character_error_rate() -> None:
    box = (0.0, 0.0, 1.0, 1.0)
    page = Page("p", Image.new("RGB", (1, 1)), tuple(Chunk(text, box) for text in ("ab", "c", "d")))
    assert reading_accuracy("ab c d", page) == reading_accuracy("ab\ncd ", page) == 1
    assert reading_accuracy("abxd", page) == reading_accuracy("abd", page) == 0.75
    assert reading_accuracy("", page) == reading_accuracy("x" * 100, page) == 0


# --- the command line ---------------------------------------------------------------------------------


def test_score_on_the_command_line(tmp_path: Path, sparsemm: CommandLine) -> None:
    out = tmp_path / "s.json"
    options = ("--data", letters(), "--pages", 5, "--max-new-tokens", 24, "--device", "cpu")
    done = sparsemm("score", checkpoint(), "--out", out, *options, "--json")
    assert done.report["path"] == str(out)
    assert done.report["n_pages"] == 5
    assert "warning: only" in done.err
    assert out.read_bytes() == expected()

    failed = sparsemm("score", tmp_path / "none", "--out", tmp_path / "t.json")
    assert (failed.status, failed.out) == (2, "")
    assert failed.err.splitlines()[-1].startswith("error: there is no folder")  # below the bar


def test_scores_show_compare_and_their_json(tmp_path: Path, sparsemm: CommandLine) -> None:
    file = tmp_path / "s.json"
    file.write_bytes(expected())
    shown = sparsemm("scores", "show", file, "--plot", tmp_path / "map.png")
    assert shown.status == 0
    assert "tiny, 3 layers x 4 heads, 2 KV heads" in shown.out
    assert Image.open(tmp_path / "map.png").size[0] > 200
    report = sparsemm("scores", "show", file, "--json").report
    table = np.array(json.loads(expected())["scores"])
    assert report["held_by_top"]["0.2"] == pytest.approx(np.sort(table.ravel())[-2:].sum() / table.sum())
    best = report["top_heads"][0]
    assert table[best["layer"], best["head"]] == table.max()

    same = sparsemm("scores", "compare", file, file, "--json").report
    assert same["spearman"] == pytest.approx(1)
    assert set(same["top_overlap"].values()) == {1}
    published = PUBLISHED_SCORES
    assert "the scores do not fit the model" in sparsemm("scores", "compare", file, published).refusal
