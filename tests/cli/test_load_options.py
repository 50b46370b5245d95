"""What llama.cpp's users are used to say when a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import typer

from helpers.command_line import CommandLine
from helpers.models import sample_image, test_model
from sparsemm_edge import cli
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime import Eviction, Loading, Lora, VisionModel
from sparsemm_edge.runtime.context import context_for
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.library import llama

QUESTION = "What is written here?"


def load(name: str = "llava", **loading: Any) -> VisionModel:
    files = test_model(name)
    return VisionModel.load(files.gguf("f32"), files.mmproj("f32"), n_threads=1, loading=Loading(**loading))


def tokens(model: VisionModel, images: Any = (), n_predict: int = 12, **options: Any) -> list[int]:
    """Greedy tokens, by a path that a test can choose."""
    text = model.chat_prompt(QUESTION, len(images))
    with (
        model.tokenize(text, images) as prompt,
        context_for(model, prompt, n_predict=12, **options) as context,
    ):
        context.prefill(encode(model, prompt))
        found = []
        for _ in range(n_predict):
            found.append(int(context.logits().argmax()))
            context.decode(found[-1])
        return found


def write_lora(path: Path, tensor: str = "blk.0.attn_v.weight", model: str = "llava") -> str:
    """A LoRA of rank 2 over one tensor of a test model."""
    shapes = {t.name: t.shape for t in gguf.GGUFReader(test_model(model).gguf("f32")).tensors}
    n_in, n_out = (int(n) for n in shapes[tensor])
    shape_a = (n_out, 2) if tensor.startswith("token_embd") else (2, n_in)
    n_rows_b = n_in if tensor.startswith("token_embd") else n_out
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    rng = np.random.default_rng(0)
    writer.add_tensor(f"{tensor}.lora_a", rng.normal(size=shape_a).astype(np.float32))
    writer.add_tensor(f"{tensor}.lora_b", rng.normal(size=(n_rows_b, 2)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


# --- LoRA


def test_a_lora_changes_the_answer_as_far_as_its_scale_says(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.gguf")
    answers = []
    for loras in ((), (Lora(path, 0.0),), (Lora(path),), (Lora(path, 0.5), Lora(path, 0.5))):
        with load(loras=loras) as model:
            answers.append(tokens(model))
    assert answers[0] == answers[1] != answers[2] == answers[3]


def test_a_lora_over_the_token_embeddings_counts_beside_images_too(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.gguf", "token_embd.weight")
    image = [sample_image(test_model("llava").image_size, 1)]
    with load() as plain, load(loras=(Lora(path),)) as changed:
        assert tokens(changed, image) != tokens(plain, image)


def test_a_lora_costs_an_evicting_cache_nothing(tmp_path: Path) -> None:
    """The prompt is read layer by layer with a LoRA too: what the cache took at its peak is the same."""
    stats = []
    for loras in ((), (Lora(write_lora(tmp_path / "a.gguf")),)):
        with (
            load(loras=loras) as model,
            model.tokenize("x" * 300) as prompt,
            context_for(
                model, prompt, n_predict=1, eviction=Eviction(policy="uniform", budget=64)
            ) as context,
        ):
            context.prefill(encode(model, prompt))
            stats.append(context.kv_stats())
    assert stats[0] == stats[1]
    assert stats[0].n_evictions == 1 and stats[0].bytes_peak < stats[0].bytes_full


def test_a_conversation_does_not_go_on_with_another_lora(tmp_path: Path, sparsemm: CommandLine) -> None:
    path = write_lora(tmp_path / "a.gguf")
    arguments = ("generate", "-m", test_model("llava").gguf(), "-p", "x", "-n", 4, "--threads", 1)
    assert sparsemm(*arguments, "--lora", path, "--save-session", tmp_path / "s").status == 0
    assert sparsemm(*arguments, "--lora", path, "--load-session", tmp_path / "s").status == 0
    assert "other --lora" in sparsemm(*arguments, "--load-session", tmp_path / "s").refusal
    assert (
        "other --lora"
        in sparsemm(*arguments, "--lora", f"{path}=0.5", "--load-session", tmp_path / "s").refusal
    )


def test_a_scale_follows_the_file_unless_the_file_is_called_so(tmp_path: Path) -> None:
    assert Lora.parse("a=b.gguf=0.5") == Lora("a=b.gguf", 0.5)
    assert Lora.parse("a.gguf") == Lora("a.gguf")
    named = tmp_path / "rank=8"
    named.touch()
    assert Lora.parse(str(named)) == Lora(str(named))
    with pytest.raises(SparseMMError, match="expected a file, or FILE=SCALE"):
        Lora.parse("rank=high")


# --- threads, memory, images


def test_prompts_are_read_with_their_own_number_of_threads() -> None:
    for loading, expected in (({}, (1, 1)), ({"n_threads_batch": 2}, (1, 2))):
        with (
            load(**loading) as model,
            model.tokenize("x") as prompt,
            context_for(model, prompt, n_predict=1) as context,
        ):
            pointer = context.pointer
            assert (llama.llama_n_threads(pointer), llama.llama_n_threads_batch(pointer)) == expected


@pytest.mark.parametrize(
    ("options", "mode"),
    [([], "mmap"), (["--no-mmap"], "none"), (["--mlock"], "mmap+mlock"), (["--mlock", "--no-mmap"], "mlock")],
)
def test_the_file_is_mapped_read_or_locked(options: list[str], mode: str, sparsemm: CommandLine) -> None:
    done = sparsemm("generate", "-m", test_model("llava").gguf(), "-p", "x", "-n", 1, *options, "--verbose")
    assert done.status == 0
    assert f"(load_mode = {mode})" in done.err


def test_the_tokens_of_an_image_are_bounded_where_its_size_decides() -> None:
    image = [sample_image(test_model("qwen2vl").image_size, 1)]

    def n_tokens(**loading: Any) -> int:
        with load("qwen2vl", **loading) as model, model.tokenize(model.chat_prompt("x", 1), image) as prompt:
            return prompt.parts[1].n_tokens

    plain = n_tokens()
    assert n_tokens(image_max_tokens=plain // 2) <= plain // 2
    assert n_tokens(image_min_tokens=plain * 2, image_max_tokens=plain * 4) >= plain * 2


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_an_encoder_that_is_unloaded_encodes_the_next_image_alike(name: str) -> None:
    images = [[sample_image(test_model(name).image_size, seed)] for seed in (1, 2)]
    with load(name) as model, load(name, unload_mmproj=True) as unloading:
        for image in images:
            assert tokens(unloading, image) == tokens(model, image)
            assert model._vision and not unloading._vision
        assert tokens(unloading) == tokens(model), "text needs none"
        assert not unloading._vision


# --- how they are written


SHORT = {
    "n_ctx": "-c",
    "n_ubatch": "-ub",
    "threads": "-t",
    "threads_batch": "-tb",
    "cache_type_k": "-ctk",
    "cache_type_v": "-ctv",
    "n_gpu_layers": "-ngl",
    "n_predict": "-n",
    "seed": "-s",
}
RUNS_A_MODEL = ("generate", "chat", "serve", "fit", "profile", "bench", "kept", "eval")


def all_options() -> dict[str, dict[str, list[str]]]:
    """The names of every option, by command and parameter."""
    group: Any = typer.main.get_command(cli.app)
    commands = {
        f"{name} {sub}".strip(): each
        for name, command in group.commands.items()
        for sub, each in getattr(command, "commands", {"": command}).items()
    }
    return {
        name: {option.name: option.opts for option in each.params if option.param_type_name == "option"}
        for name, each in commands.items()
    }


def test_options_have_the_short_names_of_llama_cpp() -> None:
    for command, options in all_options().items():
        for name, short in SHORT.items():
            assert short in options.get(name, [short]), (command, name)
        if command in RUNS_A_MODEL:
            assert "n_gpu_layers" in options, command
        # where -t is and -tb is not, -tb 4 would be read as -t b
        assert ("threads" in options) == ("threads_batch" in options), command


@pytest.mark.parametrize("command", ["generate", "profile", "kept", "chat", "eval", "fit", "bench"])
def test_short_options_are_not_others_with_a_text(
    command: str, tmp_path: Path, sparsemm: CommandLine
) -> None:
    files = test_model("llava")
    sample_image(files.image_size, 1).save(tmp_path / "page.png")
    arguments: list[Any] = ["-m", files.gguf(), "-t", "1", "-tb", "1"]
    if command == "fit":
        arguments = [files.gguf()]
    if command != "bench":
        arguments += ["--mmproj", files.mmproj()]
    if command not in ("fit", "bench"):
        arguments += ["--no-mmproj-offload", "--image-max-tokens", "9", "--no-mmap"]
    asked = ["-p", "x", "--image", tmp_path / "page.png"]
    evicted = ["--policy", "uniform", "--budget", "32", "--window", "8"]
    arguments += {
        "generate": ["-c", "900", "-n", "2", "-s", "3", "-ub", "99", "-ctk", "f32", "-ctv", "bf16", *asked],
        "profile": ["-n", "2", "--out", tmp_path / "p", *evicted[:2], "--kv-max-tail", "64", *asked],
        "kept": ["--out", tmp_path / "k.png", *evicted, "-ctk", "f32", "-ctv", "f32", "-ub", "99", *asked],
        "chat": ["-c", "900", "-s", "3", "-ctk", "f32", "-ctv", "f32", "--image", "nowhere.png"],
        "eval": [
            *("--fidelity-only", tmp_path, "-c", "900", "-n", "2", "-s", "3", "--out", tmp_path / "e"),
            *("--policies", "uniform", "--budgets", "32", "--window", "8"),
        ],
        "fit": ["-c", "900", "-n", "2", "-ub", "99", "-ctk", "f32", "-ctv", "bf16", "--image", "99x99"],
        "bench": [
            "--n-prompt",
            "20",
            "--budgets",
            "16",
            "--rounds",
            "1",
            "-ub",
            "99",
            "--out",
            tmp_path / "b",
        ],
    }[command]
    done = sparsemm(command, *arguments, "-ngl", "99")
    if command == "chat":  # it came as far as the image
        assert "nowhere.png" in done.refusal
    else:
        assert done.status == 0, done.err


@pytest.mark.parametrize("command", ["generate", "eval", "fit"])
def test_layers_on_the_gpu_are_what_llama_cpp_is_told(
    command: str, tmp_path: Path, sparsemm: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This build has no GPU: what llama.cpp gets is all that can be seen."""
    told: list[int] = []
    load_model = llama.llama_model_load_from_file

    def spy(path: bytes, params: Any) -> Any:
        told.append(params.n_gpu_layers)
        return load_model(path, params)

    monkeypatch.setattr(llama, "llama_model_load_from_file", spy)
    files = test_model("llava")
    sample_image(files.image_size, 1).save(tmp_path / "page.png")
    arguments: list[Any] = {
        "generate": ["-m", files.gguf(), "-n", 1, "-p", "x", "-t", 1],
        "eval": [
            *("-m", files.gguf(), "--mmproj", files.mmproj(), "--fidelity-only", tmp_path, "-n", 1, "-t", 1),
            *(
                "--policies",
                "uniform",
                "--budgets",
                "32",
                "--window",
                "8",
                "--resume",
                "--out",
                tmp_path / "e",
            ),
        ],
        "fit": [files.gguf()],
    }[command]
    assert sparsemm(command, *arguments, "-ngl", 7).status == 0
    if command == "eval":
        (tmp_path / "e" / "results.jsonl").unlink()
    assert sparsemm(command, *arguments).status == 0
    assert told == [7, llama.llama_model_default_params().n_gpu_layers]


def test_a_build_without_a_gpu_fits_the_same_whatever_goes_onto_one(sparsemm: CommandLine) -> None:
    totals = [
        [
            row["total"] - row["program"]
            for row in sparsemm("fit", test_model("llava").gguf(), *more).report["rows"]
        ]
        for more in (["--json"], ["--json", "-ngl", 1])
    ]
    assert totals[0] == totals[1]


def test_a_lora_in_eval_is_in_its_answers_and_in_the_way_of_resuming(
    tmp_path: Path, sparsemm: CommandLine
) -> None:
    files, lora = test_model("llava"), write_lora(tmp_path / "a.gguf")
    (tmp_path / "pages").mkdir()
    sample_image(files.image_size, 1).save(tmp_path / "pages" / "page.png")
    arguments: list[Any] = ["eval", "-m", files.gguf(), "--mmproj", files.mmproj(), "-n", 8, "-t", 1]
    arguments += ["--fidelity-only", tmp_path / "pages", "--policies", "full", "--budgets", 32]
    arguments += ["--cache-types", "f16", "--resume"]

    def answer(*more: Any) -> list[str]:
        out = tmp_path / str(len(more))
        assert sparsemm(*arguments, "--out", out, *more).status == 0
        return [json.loads(line)["answer"] for line in (out / "results.jsonl").read_text().splitlines()[1:]]

    plain, changed = answer(), answer("--lora", lora)
    assert plain != changed
    refusal = sparsemm(*arguments, "--out", tmp_path / "0", "--lora", lora).refusal
    assert "is of another run, --resume cannot go on with it: loras was None" in refusal


def test_the_image_encoder_stays_off_the_gpu_if_it_should() -> None:
    class Params:
        use_gpu: bool

    for offload in (True, False):
        Loading(mmproj_offload=offload).set_vision_params(Params)
        assert Params.use_gpu is offload


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-ngl", "-2"], "--n-gpu-layers is -2: it must be -1 to"),
        (["-ngl", 2**31], "--n-gpu-layers is 2147483648"),
        (["-tb", "0"], "--threads-batch is 0"),
        (["--image-min-tokens", "0"], "--image-min-tokens is 0"),
        (["--image-max-tokens", 2**17], "--image-max-tokens is 131072: it must be 1 to 65536"),
        (["--image-max-tokens", 2**31], "--image-max-tokens is 2147483648"),
        (["--image-min-tokens", "9", "--image-max-tokens", "8"], "more than image_max_tokens, 8"),
        (["--lora", "nowhere.gguf"], "nowhere.gguf"),
        (["--lora", "MODEL"], "cannot be used as a LoRA"),
        (["--lora", "MODEL=x"], "expected a file, or FILE=SCALE"),
        (["--lora", "MODEL=nan"], "the scale of a LoRA is -1000 to 1000, not nan"),
        (["--lora", "OTHER"], "cannot be used as a LoRA"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    arguments: list[Any], said: str, tmp_path: Path, sparsemm: CommandLine
) -> None:
    files = {
        "MODEL": str(test_model("llava").gguf()),
        "OTHER": write_lora(tmp_path / "other.gguf", model="llava-gqa", tensor="blk.0.attn_k.weight"),
    }
    given = []
    for argument in map(str, arguments):
        name, found, scale = argument.partition("=")
        given.append(files.get(name, name) + found + scale)
    assert said in sparsemm("generate", "-m", test_model("llava").gguf(), "-p", "x", *given).refusal
