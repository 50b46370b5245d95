"""eval on small real models: its answers are llama.cpp's and generate's, its work is not done twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.command_line import CommandLine
from helpers.model_files import random_scores
from sparsemm_edge import defaults
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.convert import convert
from sparsemm_edge.demo import DemoModel
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.evaluation.datasets import DataSet, Question
from sparsemm_edge.evaluation.run import EvalJob, Evaluator, Record, Results, run
from sparsemm_edge.evaluation.settings import Setting
from sparsemm_edge.runtime import Conversation, Eviction, VisionModel, generate

PROMPT = "What is written here? Answer briefly, in the words of the page itself."
FULL = Setting("full")
N_PREDICT = 12


def setting(policy: str, budget: int, window: int = 8, **changes: Any) -> Setting:
    return Setting(policy, budget=budget, window=window, **{"floor_ratio": defaults.FLOOR_RATIO, **changes})


@pytest.fixture
def scores(models: Callable[[str], Any], tmp_path: Path) -> Path:
    return random_scores(models("llava").gguf(), tmp_path)


def picture(models: Callable[[str], Any], seed: int, name: str = "llava") -> Image.Image:
    from helpers.models import sample_image

    return sample_image(models(name).image_size, seed)


def question(page: str, image: Any, prompt: str = PROMPT, name: str = "") -> Question:
    return Question(name or f"{page}: {prompt}", page, image, prompt, "reading", "cer", ("something",))


def job_of(models: Callable[[str], Any], scores: Path | None = None, name: str = "llava") -> EvalJob:
    files = models(name)
    return EvalJob(files.gguf(), files.mmproj(), scores, N_PREDICT, n_threads=1)


def evaluate(
    job: EvalJob, questions: list[Question], settings: list[Setting], path: Path, **options: Any
) -> dict[tuple[str, str], Record]:
    data = DataSet("by hand", tuple(questions), N_PREDICT)
    results = Results(path, job, data, resume=options.pop("resume", False))
    run(job, data, settings, results, n_jobs=options.pop("n_jobs", 1))
    results.close()
    return results.records


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_the_full_cache_answers_as_llama_cpp_does_without_this_package(
    name: str, models: Callable[[str], Any]
) -> None:
    from helpers.native import Native

    page = picture(models, 3, name)
    with Evaluator(job_of(models, name=name)) as evaluator:
        (record,) = evaluator.answer(question("p", page), [FULL])
        text = evaluator._model.chat_prompt(PROMPT, 1)
        with Native(models(name).gguf(), models(name).mmproj(), n_threads=1) as native:
            tokens = native.greedy(text, [page], n_predict=N_PREDICT, type_kv=1)[0]
        ends = [i for i, token in enumerate(tokens) if evaluator._model.ends_turn(token)]
        assert record.answer == evaluator._model.text_of(tokens[: ends[0]] if ends else tokens)
    assert (record.agreement, record.first_divergence, record.kl) == (1, None, 0)
    assert record.kept == record.n_prompt and record.kv_bytes == record.kv_full_bytes


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_every_setting_answers_as_generate_does(
    cache_type: str, models: Callable[[str], Any], scores: Path
) -> None:
    page = picture(models, 3)
    settings = [
        setting("full", 0, cache_type=cache_type),
        setting("sparsemm", 24, cache_type=cache_type),
        setting("sparsemm", 40, 70, cache_type=cache_type),  # a window over half of the budget: 20
        setting("uniform", 24, cache_type=cache_type),
        setting("pyramid", 48, cache_type=cache_type),
        setting("random", 48, 16, cache_type=cache_type),
        setting("uniform", 4000, cache_type=cache_type),
    ]
    job = job_of(models, scores)
    with Evaluator(job) as evaluator:
        records = evaluator.answer(question("p", page), settings)
    assert len({record.answer for record in records}) > 2  # they do differ
    by_key = {record.setting: record for record in records}
    with VisionModel.load(job.model, job.mmproj, n_threads=1) as model:
        for each in settings:
            found = by_key[each.key]
            evicts = each.policy != "full"
            wanted = Eviction(
                policy=each.policy,
                budget=each.budget if evicts else None,
                window=each.window_of(found.n_prompt) if evicts else None,
                scores=scores if each.policy == "sparsemm" else None,
            )
            answer = generate(
                model,
                PROMPT,
                [page],
                n_predict=N_PREDICT,
                cache_type_k=cache_type,
                cache_type_v=cache_type,
                eviction=wanted,
            )
            assert found.answer == "".join(answer), each
            stats = answer.stats().kv
            n_new = answer.stats().n_generated - (answer.stats().n_generated == N_PREDICT)
            assert found.kept == pytest.approx(stats.positions_kept_mean - n_new)
            # a slot takes the place of a position in every head that evicts, which these all do
            n_places = min(each.budget or found.n_prompt, found.n_prompt)
            assert found.kv_bytes == pytest.approx(
                stats.bytes_full * n_places / (found.n_prompt + n_new), rel=1e-9
            )
            assert found.kept <= n_places and (found.kept == found.n_prompt) == (n_places == found.n_prompt)


def test_a_budget_over_the_prompt_agrees_in_everything(models: Callable[[str], Any]) -> None:
    with Evaluator(job_of(models)) as evaluator:
        roomy, tight = evaluator.answer(
            question("p", picture(models, 3)), [setting("uniform", 4000), setting("uniform", 10, 4)]
        )
    assert (roomy.agreement, roomy.first_divergence) == (1, None)
    assert roomy.kl < 1e-3 < tight.kl
    assert roomy.kept == roomy.n_prompt


# --- several questions over one cache

LATER = ("And this?", "And what is below it?")


def conversation(page: str, image: Any) -> Question:
    """A question with two later ones."""
    later = tuple(question(page, image, prompt) for prompt in LATER)
    return replace(question(page, image), later=later)


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_later_questions_are_answered_as_chat_answers_them(name: str, models: Callable[[str], Any]) -> None:
    page = picture(models, 3, name)
    settings = [FULL, setting("uniform", 24), setting("uniform", 48, cache_type="q4_0", vote="snapkv")]
    job = replace(job_of(models, name=name), n_turns=3)
    with Evaluator(job) as evaluator:
        records = evaluator.answer(conversation("p", page), settings)
    by_key: dict[str, list[Record]] = {}
    for record in records:
        by_key.setdefault(record.setting, []).append(record)
    assert len({record.answer for record in records}) > 4  # they do differ
    with VisionModel.load(job.model, job.mmproj, n_threads=1) as model:
        for each in settings:
            wanted = Eviction(enabled=False)
            if each.policy != "full":
                wanted = Eviction(True, each.policy, each.budget, each.window_of(0), vote=each.vote)
            types = {"cache_type_k": each.cache_type, "cache_type_v": each.cache_type}
            with Conversation(model, n_ctx=1024, eviction=wanted, **types) as chat:
                for place, found in enumerate(by_key[each.key], 1):
                    images = [page] if place == 1 else []
                    answer = "".join(chat.ask((PROMPT, *LATER)[place - 1], images, n_predict=N_PREDICT))
                    assert (found.place, found.answer) == (place, answer), each


def test_a_later_question_evicts_again_or_nothing(models: Callable[[str], Any]) -> None:
    again, keep = setting("uniform", 24), setting("uniform", 24, later="keep")
    with Evaluator(replace(job_of(models), n_turns=2)) as evaluator:
        records = evaluator.answer(conversation("p", picture(models, 3)), [again, keep])
    found = {(record.setting, record.place): record for record in records}
    first, second = (found[keep.key, place] for place in (1, 2))
    assert replace(first, setting=again.key) == found[again.key, 1]
    assert (first.kept, found[again.key, 2].kept) == (23, 23)  # and a slot for what was lost
    assert second.kept == 23 + second.n_prompt - first.n_prompt > 24


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_an_image_that_is_evicted_before_the_first_question_is_held_as_it_is(
    name: str, models: Callable[[str], Any]
) -> None:
    page = picture(models, 3, name)
    image = setting("uniform", 24, later="image")
    with Evaluator(replace(job_of(models, name=name), n_turns=2, cross=True)) as evaluator:
        records = evaluator.answer(conversation("p", page), [image])
        (alone,) = evaluator.answer(question("p", page, LATER[0]), [image])[:1]
    first, second, instead = records
    n_image = first.n_prompt - (first.kept - 23)
    assert 0 < n_image < first.n_prompt
    assert second.kept == 23 + second.n_prompt - n_image
    # whichever question comes first
    assert (instead.answer, instead.n_prompt, instead.kept) == (alone.answer, alone.n_prompt, alone.kept)
    assert instead.kl == pytest.approx(alone.kl, rel=0.01)


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_a_question_in_the_place_of_another_is_as_if_it_had_been_the_first(
    name: str, models: Callable[[str], Any]
) -> None:
    page = picture(models, 3, name)
    roomy, tight = setting("uniform", 4000, 4), setting("uniform", 24, 4)
    with Evaluator(replace(job_of(models, name=name), cross=True)) as evaluator:
        alone = {
            record.setting: record
            for record in evaluator.answer(question("p", page, LATER[0]), [FULL, roomy])
        }
        short = replace(question("p", page, "Is it?"), later=(question("p", page, LATER[0]),))
        records = evaluator.answer(short, [FULL, roomy, tight])
    found = {record.setting: record for record in records if record.instead}
    for each in (FULL, roomy):
        assert found[each.key].answer == alone[each.key].answer
        assert (found[each.key].n_prompt, found[each.key].kept) == (alone[each.key].n_prompt,) * 2
    assert found[roomy.key].kl < 1e-3
    # the question that is to be taken back was evicted in part
    assert "longer than the window" in (found[tight.key].skipped or "")


def test_what_was_kept_for_a_question_is_what_another_in_its_place_finds(
    models: Callable[[str], Any],
) -> None:
    asked = replace(
        question("p", picture(models, 3), "What?"), later=(question("p", picture(models, 3), LATER[0]),)
    )
    tight = setting("uniform", 80, 20)
    with Evaluator(replace(job_of(models), cross=True)) as evaluator:
        first, other = evaluator.answer(asked, [tight])
    assert (other.error, other.skipped) == (None, None)
    assert first.kept == 79
    # nothing is evicted for the other one
    assert other.kept - first.kept == other.n_prompt - first.n_prompt
    assert other.answer != first.answer


def test_what_is_asked_of_a_question_has_names_of_its_own(models: Callable[[str], Any]) -> None:
    page = Path("p.png")
    job = replace(job_of(models), n_turns=3, cross=True)
    asked = job.asked(conversation("p", page))
    assert [(each.place, each.instead) for each in asked] == [(1, False), (2, False), (3, False), (1, True)]
    assert len({each.name for each in asked}) == 4
    assert len(replace(job, n_turns=2).asked(conversation("p", page))) == 3
    assert [each.name for each in job.asked(question("p", page, name="alone"))] == ["alone"]


def test_a_conversation_is_gone_on_with_as_a_whole(
    models: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, path = [conversation(f"p{i}", picture(models, i)) for i in range(2)], tmp_path / "r.jsonl"
    job = job_of(models)
    first = evaluate(job, questions, [FULL, setting("uniform", 20)], path)
    assert len(first) == 4
    longer = evaluate(replace(job, n_turns=3), questions, [FULL, setting("uniform", 20)], path, resume=True)
    assert len(longer) == 12
    for key, record in first.items():
        # the later questions need room as well, which a full cache allocates at once
        assert replace(longer[key], kv_allocated=record.kv_allocated) == record


def test_a_conversation_that_does_not_fit_fails_where_it_is_full(models: Callable[[str], Any]) -> None:
    page = picture(models, 1)
    later = tuple(question("p", page, prompt) for prompt in ("More?", "word " * 60, "And?"))
    with Evaluator(replace(job_of(models), n_turns=4, n_ctx=260, cross=True)) as evaluator:
        records = evaluator.answer(replace(question("p", page), later=later), [FULL])
    # not where the second one is asked in the place of the first
    assert [bool(record.error) for record in records] == [False, False, True, True, False]
    assert "the context has 260" in (records[2].error or "")


def test_an_image_is_encoded_once_and_a_prompt_read_twice(
    models: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsemm_edge.runtime.context import Context
    from sparsemm_edge.runtime.image_store import ImageStore

    calls = {"encode": 0, "prefix": 0, "whole": 0}

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: Any, *arguments: Any) -> Any:
            calls[name] += name == "encode" or self.n_tokens == 0
            return function(self, *arguments)

        return counted

    monkeypatch.setattr(ImageStore, "put", count("encode", ImageStore.put))  # what was encoded
    monkeypatch.setattr(Context, "append", count("prefix", Context.append))
    monkeypatch.setattr(Context, "prefill", count("whole", Context.prefill))
    questions = [question("a", picture(models, 1)), question("a", picture(models, 1), "And this?")]
    questions.append(question("b", picture(models, 2)))
    settings = [FULL] + [setting("uniform", budget) for budget in (10, 20, 30, 40)]
    evaluate(job_of(models), questions, settings, tmp_path / "r.jsonl")
    # for every question: the whole prompt for the full cache, the prefix for all the others
    assert calls == {"encode": 2, "prefix": 3, "whole": 3}


def test_a_run_goes_on_where_it_was_stopped(
    models: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [question(f"p{i}", picture(models, i)) for i in range(3)]
    settings, path = [FULL, setting("uniform", 20)], tmp_path / "r.jsonl"
    job = job_of(models)
    whole = evaluate(job, questions, settings, path)
    assert len(whole) == 6
    with pytest.raises(SparseMMError, match="--resume goes on"):
        evaluate(job, questions, settings, path)

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:30])  # stopped while it wrote the second page
    answered = []
    answer = Evaluator.answer

    def spy(self: Evaluator, asked: Question, under: Any) -> Any:
        answered.append((asked.page, len(under)))
        return answer(self, asked, under)

    monkeypatch.setattr(Evaluator, "answer", spy)
    assert evaluate(job, questions, settings, path, resume=True) == whole
    assert answered == [("p1", 1), ("p2", 2)]
    # a setting more is run for all, nothing is run anew
    answered.clear()
    evaluate(job, questions, [*settings, setting("uniform", 30)], path, resume=True)
    assert answered == [("p0", 1), ("p1", 1), ("p2", 1)]
    answered.clear()
    evaluate(job, questions, settings, path, resume=True)
    assert answered == []

    other = job_of(models, name="llava-gqa")
    with pytest.raises(SparseMMError, match="of another run"):
        evaluate(other, questions, settings, path, resume=True)
    path.write_text("nothing\n")
    with pytest.raises(SparseMMError, match="not a file of eval's results"):
        evaluate(job, questions, settings, path, resume=True)


def test_what_fails_is_recorded_and_tried_again(models: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    questions = [
        question("good", picture(models, 1)),
        question("broken", tmp_path / "broken.png"),
        question("bytes", b"no image"),
        question("gone", tmp_path / "gone.png"),
        question("long", picture(models, 1), "word " * 4000),
    ]
    settings, path = [FULL, setting("uniform", 20)], tmp_path / "r.jsonl"
    records = evaluate(job_of(models), questions, settings, path)
    errors = {record.page: record.error or "" for record in records.values()}
    assert not errors["good"]
    assert "broken.png: not an image" in errors["broken"]
    assert "not an image" in errors["bytes"]
    assert "gone.png: no such file" in errors["gone"]
    assert "the context has" in errors["long"]
    picture(models, 2).save(tmp_path / "gone.png")
    records = evaluate(job_of(models), questions, settings, path, resume=True)
    assert records[questions[3].name, FULL.key].error is None


def test_a_process_that_dies_is_an_error_and_what_was_done_is_saved(
    models: Callable[[str], Any], tmp_path: Path
) -> None:
    class Deadly(Image.Image):
        def __reduce__(self) -> Any:  # sent to a process, it ends that process
            return os._exit, (1,)

    questions = [question("good", picture(models, 1)), question("deadly", Deadly())]
    path = tmp_path / "r.jsonl"
    with pytest.raises(SparseMMError, match="--resume goes on"):
        evaluate(job_of(models), questions, [FULL], path, n_jobs=2)
    questions[1] = question("deadly", picture(models, 2))
    assert len(evaluate(job_of(models), questions, [FULL], path, resume=True)) == 2


def test_several_processes_find_what_one_does(models: Callable[[str], Any], tmp_path: Path) -> None:
    questions = [question(f"p{i}", picture(models, i)) for i in range(3)]
    settings = [FULL, setting("uniform", 20), setting("random", 20)]
    alone = evaluate(job_of(models), questions, settings, tmp_path / "1.jsonl")
    assert evaluate(job_of(models), questions, settings, tmp_path / "2.jsonl", n_jobs=2) == alone


def test_number_types_that_do_not_divide_a_head_are_refused_before_anything_is_run(
    models: Callable[[str], Any],
) -> None:
    with Evaluator(job_of(models)) as evaluator:
        settings = [setting("uniform", 24, cache_type=name) for name in ("f16", "q8_0", "q4_0")]
        evaluator.check(settings)
        evaluator._model.shape = replace(evaluator._model.shape, n_embd_head_k=80)
        evaluator.check(settings[:1])
        for each in settings[1:]:
            with pytest.raises(SparseMMError, match=r"blocks of 32 numbers.* have 80"):
                evaluator.check([each])


# --- the commands


def test_eval_writes_a_table_a_plot_and_json(
    models: Callable[[str], Any], scores: Path, tmp_path: Path, sparsemm: CommandLine
) -> None:
    llava, out = models("llava"), tmp_path / "out"
    for i in range(2):
        picture(models, i).save(tmp_path / f"{i}.png")
    rows = [
        {"image": f"{i}.png", "question": PROMPT, "answers": ["x"], "metric": "anls"} for i in (0, 1, "none")
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    model = convert(llava.gguf(), scores, tmp_path / "c.gguf", spec=BudgetSpec(budget=48, window=8)).path
    files = ("-m", model, "--mmproj", llava.mmproj(), "--threads", 1, "--out", out, "-n", 4)
    options = ("--data", tmp_path / "q.jsonl", "--retention", "20,50", "--window", 8, "--random-seeds", 2)
    status, printed, _ = sparsemm("eval", *files, *options, "--water-fill", "both")
    assert status == 0
    assert "1 of 3 questions failed" in printed and "none.png: no such file" in printed
    assert sorted(path.name for path in out.iterdir()) == ["eval.json", "eval.png", "results.jsonl"]
    report = json.loads((out / "eval.json").read_text())
    # full in three types, sparsemm with and without water-filling, five more
    assert len(report["rows"]) == 3 + 2 * 2 + 5 * 2
    assert len(report["failures"]) == 1
    kept = {row["label"]: row["kv_share"] for row in report["rows"] if row["setting"]["retention"] == 50}
    assert kept["sparsemm"] == pytest.approx(kept["uniform"]) == pytest.approx(0.5, abs=0.01)
    assert kept["sparsemm, no water-filling"] < kept["sparsemm"]
    again = sparsemm("eval", *files, *options, "--resume", "--json").report
    assert len(again["rows"]) == len(report["rows"]) - 2  # without --water-fill both


def test_the_demo_model_is_asked_in_turn_and_in_the_place_of_another(
    tmp_path: Path, sparsemm: CommandLine
) -> None:
    demo = DemoModel()
    files = ("-m", demo.model, "--mmproj", demo.mmproj, "--threads", 1, "--out", tmp_path / "out")
    asked = ("--data", "grid", "--pages", 1, "--policies", "uniform", "--retention", 50, "--window", 16)
    report = sparsemm("eval", *files, *asked, "--json").report
    assert report["failures"] == report["skipped"] == []

    def way(row: dict[str, Any]) -> tuple[str, str, int, bool]:
        return row["first_task"], row["task"], row["place"], row["instead"]

    full = {way(row): row["score"]["mean"] for row in report["rows"] if row["label"] == "full"}
    first = [("lookup", "lookup", 1, False), ("reading", "reading", 1, False)]
    later = [("lookup", "lookup", place, False) for place in (2, 3, 4)] + [("reading", "lookup", 2, False)]
    instead = [("lookup", "lookup", 1, True), ("reading", "lookup", 1, True)]
    assert set(full) == {*first, *later, *instead}
    assert len(report["rows"]) == 2 * len(full)
    # the same look-up, first and in the place of reading
    assert full[instead[1]] == full[first[0]]
    alone = sparsemm("eval", *files, *asked, "--resume", "--turns", 1, "--no-cross", "--json").report
    assert alone["rows"] == [row for row in report["rows"] if way(row) in first]


def test_eval_judges_fidelity_without_answers(
    models: Callable[[str], Any], tmp_path: Path, sparsemm: CommandLine
) -> None:
    llava = models("llava")
    (tmp_path / "images").mkdir()
    picture(models, 1).save(tmp_path / "images" / "a.png")
    files = ("-m", llava.gguf(), "--mmproj", llava.mmproj(), "--threads", 1, "--out", tmp_path / "out")
    asked = ("--fidelity-only", tmp_path / "images", "-n", 8, "--policies", "uniform", "--window", 8)
    rows = sparsemm("eval", *files, *asked, "--budgets", "20,2000", "--json").report["rows"]
    assert [row["score"] for row in rows] == [None] * 3
    full, tight, roomy = rows
    assert full["kl"]["mean"] == 0 and roomy["kl"]["mean"] < tight["kl"]["mean"]
    assert roomy["agreement"]["mean"] == 1 and roomy["identical"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--data with questions, or --fidelity-only"),
        (["--data", "grid", "--fidelity-only", "."], "--data with questions, or --fidelity-only"),
        (["--data", "nowhere"], "no data set at nowhere"),
        (["--data", "grid", "--policies", "best"], "unknown policy 'best'"),
        (["--data", "grid", "--retention", "five"], "--retention five: expected numbers"),
        (["--data", "grid", "--water-fill", "maybe"], "--water-fill is 'maybe': expected yes, no or both"),
        (["--data", "grid", "--jobs", 0], "--jobs is 0"),
        (["--data", "grid", "--pages", 0], "--pages is 0"),
        (
            ["--data", "grid", "--pages", 1, "--cache-types", "q9", "--policies", "uniform"],
            "unknown cache type 'q9'",
        ),
        (["--data", "grid", "--residual", "maybe"], "--residual is 'maybe': expected yes, no or both"),
        (["--data", "grid", "--later", "never"], "unknown rule for later questions 'never'"),
        (["--data", "grid", "--turns", 0], "--turns is 0"),
        (["--data", "grid", "--pages", 1], "no head scores"),
        (["--data", "grid", "--pages", 1, "--jobs", 2], "no head scores"),
    ],
)
def test_bad_wishes_are_one_clear_line(
    arguments: list[Any], said: str, models: Callable[[str], Any], tmp_path: Path, sparsemm: CommandLine
) -> None:
    llava = models("llava")
    files = ("-m", llava.gguf(), "--mmproj", llava.mmproj(), "--out", tmp_path / "out")
    done = sparsemm("eval", *files, *arguments)
    assert (done.status, done.out) == (2, "")
    last = done.err.splitlines()[-1]  # there may be a bar above it
    assert last.startswith("error: ") and said in last


def test_kept_draws_what_one_prompt_keeps(
    models: Callable[[str], Any], tmp_path: Path, sparsemm: CommandLine
) -> None:
    llava = models("llava")
    picture(models, 1).save(tmp_path / "a.png")
    asked = ("-m", llava.gguf(), "--mmproj", llava.mmproj(), "--image", tmp_path / "a.png", "-p", PROMPT)
    wanted = ("--policy", "uniform", "--budget", 24, "--window", 8, "--threads", 1)
    out = tmp_path / "kept.png"
    assert sparsemm("kept", *asked, *wanted, "--out", out, "--view", "layer").status == 0
    with Image.open(out) as drawn:
        assert drawn.format == "PNG"
    out.unlink()
    for more, said in (
        (("--out", tmp_path / "kept.jpg", *wanted), "must end in .png"),
        (("--out", out, *wanted, "--view", "most"), "unknown view 'most'"),
        (("--out", out), "nothing is evicted"),
        (("--out", out, *wanted, "--budget", 5000), "nothing is evicted"),
    ):
        assert said in sparsemm("kept", *asked, *more).refusal
    assert not out.exists()
