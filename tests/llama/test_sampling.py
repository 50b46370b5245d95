"""How answers are sampled, where they stop, and what they can be made to look like."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import CommandLine
from helpers.models import test_model
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime import Sampling, VisionModel, generate
from sparsemm_edge.runtime.sampler import StopTexts

PROMPT = "Tell me more."
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "n": {"type": "integer"}},
    "required": ["name", "n"],
}


@pytest.fixture(scope="module")
def model() -> Iterator[VisionModel]:
    with VisionModel.load(test_model("llava").gguf("f32"), n_threads=1) as opened:
        yield opened


def text(model: VisionModel, n_predict: int = 40, **options: Any) -> str:
    return "".join(generate(model, PROMPT, n_predict=n_predict, sampling=Sampling(**options)))


def tokens(model: VisionModel, n_predict: int = 40, **options: Any) -> tuple[int, ...]:
    answer = generate(model, PROMPT, n_predict=n_predict, sampling=Sampling(**options))
    list(answer)
    return answer.stats().tokens


# --- numbers


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-30}])
def test_one_candidate_is_the_likeliest_token_at_any_temperature(
    narrow: dict[str, Any], model: VisionModel
) -> None:
    assert tokens(model, **{"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | narrow) == tokens(
        model
    )


@pytest.mark.parametrize(("top_k", "kinds"), [(2, range(2, 3)), (7, range(5, 8)), (0, range(30, 61))])
def test_only_the_likeliest_so_many_are_sampled_from(top_k: int, kinds: range, model: VisionModel) -> None:
    """At a temperature that makes all candidates alike."""
    alike = {"temperature": 1000.0, "top_p": 1.0, "min_p": 0.0, "top_k": top_k}
    assert len({tokens(model, 1, seed=seed, **alike) for seed in range(60)}) in kinds


def test_a_seed_of_minus_one_is_another_one_each_time(model: VisionModel) -> None:
    assert len({tokens(model, temperature=1.0, seed=-1) for _ in range(3)}) == 3
    assert len({tokens(model, temperature=1.0, seed=7) for _ in range(3)}) == 1


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repeat_penalty"])
def test_penalties_count_at_temperature_0_and_for_the_prompt_too(penalty: str, model: VisionModel) -> None:
    with model.tokenize(model.chat_prompt(PROMPT, 0)) as prompt:
        asked = prompt.parts[0].tokens.tolist()
    plain, penalised = tokens(model), tokens(model, **{penalty: 100.0})
    assert len(set(plain)) < len(plain), "the test needs an answer that repeats itself"
    assert len(set(penalised)) == len(penalised) == 40
    assert set(penalised).isdisjoint(asked[-24:])  # the last 64 at the end of the answer


# --- where it stops


def test_an_answer_ends_before_a_text_to_stop_at(model: VisionModel) -> None:
    whole = text(model)
    stop = whole[17:21]
    answer = generate(model, PROMPT, n_predict=40, sampling=Sampling(stop=("never said", stop)))
    pieces = list(answer)
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert answer.stats().n_generated < 40
    # a text that only begins is held back until it is clear that it does not go on, and then said
    assert text(model, stop=(whole[-3:] + "and more",)) == whole


def test_no_part_of_a_text_to_stop_at_is_ever_shown() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        said = "".join(rng.choices("ab ", k=12))
        stop = "".join(rng.choices("ab ", k=rng.randint(1, 4)))
        stops, shown, rest = StopTexts([stop, "c"]), "", said
        while rest and not stops.found:
            n = rng.randint(1, 3)
            piece, rest = rest[:n], rest[n:]
            shown += stops.add(piece)
            assert said.partition(stop)[0].startswith(shown)
        assert stops.found == (stop in said)
        assert shown + stops.rest() == said.partition(stop)[0]


# --- what it looks like


def test_an_answer_follows_a_schema(model: VisionModel, tmp_path: Path, sparsemm: CommandLine) -> None:
    for options in ({}, {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}):
        found = json.loads(text(model, 200, json_schema=json.dumps(SCHEMA), **options))
        assert list(found) == ["name", "n"]
        assert len(found["name"]) <= 6 and isinstance(found["n"], int)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    for schema in (json.dumps(SCHEMA), tmp_path / "schema.json"):
        done = sparsemm("generate", "-m", model.path, "-p", PROMPT, "--json-schema", schema, "--threads", 1)
        assert list(json.loads(done.out)) == ["name", "n"]


def test_an_answer_follows_a_grammar(model: VisionModel, tmp_path: Path, sparsemm: CommandLine) -> None:
    (tmp_path / "answer.gbnf").write_text('root ::= "It is " ("red" | "blue") ", " [0-9]{3} "."\n')
    arguments = ("generate", "-m", model.path, "-p", PROMPT, "--grammar-file", tmp_path / "answer.gbnf")
    said = {sparsemm(*arguments, "--temp", 3, "--seed", seed, "--threads", 1).out for seed in range(4)}
    assert len(said) == 4
    assert all(re.fullmatch(r"It is (red|blue), \d{3}\.\n", each) for each in said)


def test_a_grammar_that_no_token_follows_is_an_error_and_no_crash(model: VisionModel) -> None:
    # llama.cpp never lets a token begin with a zero byte
    with pytest.raises(SparseMMError, match="no token of this model satisfies the grammar"):
        text(model, grammar=r'root ::= "a\x00"')


# --- what cannot be


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temp", "nan"], "--temp is nan: it must be 0 to 1000"),
        (["--temp", "-0.1"], "--temp is -0.1"),
        (["--temp", "inf"], "--temp is inf"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--top-k", 2**31], "--top-k is 2147483648"),
        (["--top-p", "1.1"], "--top-p is 1.1: it must be 0 to 1"),
        (["--min-p", "nan"], "--min-p is nan"),
        (["--repeat-penalty", "0"], "--repeat-penalty is 0.0"),
        (["--presence-penalty", "1e30"], "--presence-penalty is 1e+30"),
        (["--frequency-penalty", "-inf"], "--frequency-penalty is -inf"),
        (["--seed", "-2"], "--seed is -2: it must be -1 to"),
        (["--seed", 2**32], "--seed is 4294967296"),
        (["--stop", ""], "a stop text is empty"),
        (["--json-schema", "nowhere.json"], "cannot read nowhere.json"),
        (["--json-schema", '{"type": '], "the JSON schema is not JSON"),
        (["--json-schema", '{"type": "thing"}'], "Unrecognized schema"),
        (["--json-schema", '{"$ref": "https://example.org/x"}'], "not allowed"),
        (["--json-schema", '{"anyOf": 3}'], "cannot be turned into a grammar"),
        (["--json-schema", '{"a":' * 2000], "cannot be turned into a grammar"),
        (["--json-schema", "LIST"], "not a JSON object"),
        (["--grammar-file", "nowhere.gbnf"], "cannot read nowhere.gbnf"),
        (["--grammar-file", "BROKEN", "--json-schema", "{}"], "not both"),
        (["--grammar-file", "BROKEN"], "the grammar is broken: Undefined rule identifier 'nothing'"),
        (["--grammar-file", "EMPTY"], "the grammar is empty"),
        (["--grammar-file", "LEFT"], "left recursion"),
        (["--grammar-file", "LONG"], "number of repetitions"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(
    arguments: list[Any], said: str, tmp_path: Path, sparsemm: CommandLine
) -> None:
    contents = {
        "LIST": "[]",
        "BROKEN": "root ::= nothing",
        "EMPTY": "\n",
        "LEFT": 'root ::= root "a" | "b"',
        "LONG": 'root ::= "a"{999999}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    given = [tmp_path / argument if argument in contents else argument for argument in arguments]
    assert said in sparsemm("generate", "-m", test_model("llava").gguf(), "-p", "x", *given).refusal
