"""`convert`: the copy gains head budgets and nothing else; a mistake is one line and leaves no file."""

import dataclasses
import itertools
import json
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from helpers.command_line import CommandLine
from helpers.tiny_gguf import attention_tensors, write_model
from sparsemm_edge import SparseMMError
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.convert import convert
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import (
    check_supported,
    model_shape,
    sparsemm_metadata,
)
from sparsemm_edge.scores import group_scores

U32, F32, STRING = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
SCORES = [[0.0, 1.0, 2.0, 3.0], [40.0, 5.0, 6.0, 7.0]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny.gguf")


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return write_scores(tmp_path / "scores.json", SCORES)


def write_scores(path: Path, table: list[list[float]], n_head_kv: int | None = None) -> Path:
    content = {"format": "sparsemm-edge/head-scores", "version": 1, "model": "Tiny", "dataset": "pages"}
    shape = {"n_layer": len(table), "n_head": len(table[0]), "n_head_kv": n_head_kv}
    path.write_text(json.dumps(content | shape | {"scores": table}))
    return path


def contents(path: Path) -> tuple[dict[str, tuple[object, list[GGUFValueType]]], list[tuple[object, ...]]]:
    """A GGUF's keys (value, types) without sparsemm's, and its tensors, as gguf's own reader sees them."""
    reader = gguf.GGUFReader(path)
    keys = {
        name: (field.contents(), field.types)
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "sparsemm."))
    }
    tensors = [
        (tensor.name, tensor.tensor_type, tensor.shape.tolist(), tensor.data.tobytes())
        for tensor in reader.tensors
    ]
    return keys, tensors


def test_the_keys_are_those_of_the_format_with_their_types(model: Path, scores: Path) -> None:
    done = convert(model, scores, spec=BudgetSpec(budget=64, window=8), n_prompt=100)
    assert done.path == model.with_name("tiny.sparsemm.gguf")
    fields = gguf.GGUFReader(done.path).fields
    found = {
        name: (field.types, field.contents())
        for name, field in fields.items()
        if name.startswith("sparsemm.")
    }
    table = found.pop("sparsemm.head_budgets")
    assert table[0] == [GGUFValueType.ARRAY, U32]
    assert len(table[1]) == 2 * 2 and sum(table[1]) == 64 * 4 and max(table[1]) <= 100
    stored = found.pop("sparsemm.head_scores")
    assert stored[0] == [GGUFValueType.ARRAY, F32]
    np.testing.assert_allclose(stored[1], np.array(SCORES).ravel() / 64, rtol=1e-6)
    source = found.pop("sparsemm.scores_source")
    assert source[0] == [STRING]
    assert source[1].startswith("Tiny; data set pages; sha256 ")
    assert found == {
        "sparsemm.version": ([U32], 1),
        "sparsemm.enabled": ([GGUFValueType.BOOL], True),
        "sparsemm.policy": ([STRING], "sparsemm"),
        "sparsemm.budget": ([U32], 64),
        "sparsemm.window": ([U32], 8),
        "sparsemm.pool_kernel": ([U32], 7),
        "sparsemm.floor_ratio": ([F32], pytest.approx(0.2)),
        "sparsemm.water_fill_length": ([U32], 100),
        "sparsemm.seed": ([U32], 0),
        "sparsemm.vote": ([STRING], "mixkv"),
        "sparsemm.residual": ([GGUFValueType.BOOL], True),
    }


def test_a_file_of_before_these_keys_means_the_papers_vote_and_no_slot(model: Path, scores: Path) -> None:
    done = convert(model, scores, spec=BudgetSpec(budget=64, window=8), n_prompt=100)
    header = read_header(done.path)
    for key in ("sparsemm.vote", "sparsemm.residual"):
        del header.fields[key]
    found = sparsemm_metadata(header)
    assert found is not None and (found.spec.vote, found.spec.residual) == ("snapkv", False)


@pytest.mark.parametrize(
    ("budget", "window"),
    [(256, 32), (128, 32), (64, 16), (20, 5), (3, 1)],
)
def test_the_window_is_a_quarter_of_the_budget_at_most(
    model: Path, scores: Path, budget: int, window: int
) -> None:
    assert (
        convert(model, scores, spec=BudgetSpec().override(budget=budget), n_prompt=4000).metadata.spec.window
        == window
    )


@pytest.mark.parametrize(
    ("policy", "water_fill"),
    itertools.product(["sparsemm", "uniform", "pyramid", "random"], [True, False]),
)
def test_what_is_read_back_is_what_was_written_and_makes_the_same_table_again(
    model: Path, scores: Path, policy: str, water_fill: bool
) -> None:
    spec = BudgetSpec(policy, 64, 8, floor_ratio=0.7, water_fill=water_fill, seed=3)
    done = convert(model, scores, spec=spec, n_prompt=100)
    read = sparsemm_metadata(read_header(done.path))
    assert read is not None
    for field in dataclasses.fields(read):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(done.metadata, field.name))
    assert read.water_fill_length == (100 if water_fill else 0)
    shape = model_shape(read_header(done.path))
    assert read.spec == spec
    grouped = group_scores(read.head_scores, shape.n_head_kv)
    again = read.spec.table(grouped, shape.kv_heads, read.water_fill_length or None)
    np.testing.assert_array_equal(again, read.head_budgets)


def test_the_model_shape_is_the_files(tmp_path: Path) -> None:
    shape = model_shape(read_header(write_model(tmp_path / "tiny.gguf", n_layer=3, n_head=8, n_head_kv=2)))
    assert (shape.arch, shape.name, shape.n_layer, shape.n_head, shape.n_head_kv) == (
        "llama",
        "Tiny",
        3,
        8,
        2,
    )
    assert (shape.n_embd_head_k, shape.n_embd_head_v) == (8, 8)
    assert shape.kv_bytes(positions=10) == 10 * (8 + 8) * 2
    lengths = {"llama.attention.key_length": (32, U32), "llama.attention.value_length": (16, U32)}
    shape = model_shape(read_header(write_model(tmp_path / "wide.gguf", keys=lengths)))
    assert (shape.n_embd_head_k, shape.n_embd_head_v) == (32, 16)


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_every_other_key_and_every_tensor_type_is_copied_exactly(
    tmp_path: Path, scores: Path, alignment: int | None
) -> None:
    random = np.random.default_rng(0)
    tensors = attention_tensors()
    for kind in GGMLQuantizationType:
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        rows = random.integers(0, 256, (3, 2 * n_bytes), dtype=np.uint8)  # NaN patterns among them
        shape = (3, 2 * block)
        dtypes = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
        dtypes |= {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
        data = rows.view(dtypes[kind.name]).reshape(shape) if kind.name in dtypes else rows
        tensors[f"extra.{kind.name}"] = (data, kind)
    tensors["cube"] = (random.random((2, 3, 4), dtype=np.float32), None)
    keys: dict[str, tuple[object, GGUFValueType]] = {
        "tokenizer.ggml.tokens": (["<s>", "ä", ""], GGUFValueType.ARRAY),
        "tokenizer.ggml.scores": ([0.1, -1e30, 3.0], GGUFValueType.ARRAY),
        "tokenizer.chat_template": ("{{ x }}\n", STRING),
        "tokenizer.chat_template.tool": ("{{ y }}", STRING),
        "a.flags": ([True, False], GGUFValueType.ARRAY),
        "a.big": (2**63, GGUFValueType.UINT64),
        "a.small": (-128, GGUFValueType.INT8),
        "a.fine": (1 / 3, GGUFValueType.FLOAT64),
    }
    original = write_model(tmp_path / "tiny.gguf", tensors=tensors, keys=keys, alignment=alignment)
    done = convert(original, scores)
    assert contents(done.path) == contents(original)
    reader = gguf.GGUFReader(done.path)
    assert len(reader.tensors) == len(tensors) > len(GGMLQuantizationType)
    assert all(tensor.data_offset % (alignment or 32) == 0 for tensor in reader.tensors)


def test_converting_a_converted_file_replaces_its_budgets(model: Path, scores: Path, tmp_path: Path) -> None:
    first = convert(model, scores, spec=BudgetSpec(budget=64, window=8, policy="uniform")).path
    again = convert(
        first,
        scores,
        tmp_path / "again.gguf",
        spec=BudgetSpec().override(budget=128, floor_ratio=0.3),
        n_prompt=999,
    ).path
    direct = convert(
        model,
        scores,
        tmp_path / "direct.gguf",
        spec=BudgetSpec().override(budget=128, floor_ratio=0.3),
        n_prompt=999,
    ).path
    assert again.read_bytes() == direct.read_bytes()


def test_a_file_cut_short_at_any_byte_is_noticed(model: Path, scores: Path) -> None:
    last = max(gguf.GGUFReader(model).tensors, key=lambda tensor: tensor.data_offset)
    end = int(last.data_offset + last.n_bytes)
    whole = model.read_bytes()
    assert convert(model, scores).path.exists()
    model.with_name("tiny.sparsemm.gguf").unlink()
    for length in range(end):
        model.write_bytes(whole[:length])
        with pytest.raises(SparseMMError, match=r"cut short|not a GGUF|cannot read") as caught:
            convert(model, scores)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in model.parent.iterdir()) == ["scores.json", "tiny.gguf"]


def test_a_damaged_header_never_ends_in_a_traceback(model: Path, scores: Path) -> None:
    path = convert(model, scores).path
    whole = bytearray(path.read_bytes())
    refused = 0
    for offset in range(int(gguf.GGUFReader(path).data_offset)):
        for value in (whole[offset] ^ 0x01, 0xFF):
            damaged = whole.copy()
            damaged[offset] = value
            path.write_bytes(damaged)
            try:
                header = read_header(path)
                check_supported(header, model_shape(header))
                sparsemm_metadata(header)
            except SparseMMError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > len(whole) // 2


def test_an_existing_file_is_replaced_by_force_only(model: Path, scores: Path) -> None:
    out = model.with_name("tiny.sparsemm.gguf")
    out.write_text("precious")
    with pytest.raises(SparseMMError, match=r"tiny\.sparsemm\.gguf exists already; --force replaces it"):
        convert(model, scores)
    assert out.read_text() == "precious"
    assert convert(model, scores, force=True).path == out
    assert sparsemm_metadata(read_header(out)) is not None


def test_the_model_itself_is_never_replaced(model: Path, scores: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    for out in (model, link):
        with pytest.raises(SparseMMError, match="is the model itself; choose another --out"):
            convert(model, scores, out, force=True)
    assert model.read_bytes() == before


def test_a_failed_copy_leaves_no_file_behind(tmp_path: Path, scores: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf")
    before = sorted(tmp_path.iterdir())

    def full(done: int, total: int) -> None:
        assert 0 < done <= total
        raise OSError(28, "No space left on device")

    with pytest.raises(SparseMMError, match=r"cannot write .*: No space left on device"):
        convert(model, scores, progress=full)
    assert sorted(tmp_path.iterdir()) == before


# --- what need not be understood


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def array(item_kind: int, length: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", item_kind, length) + items


ODD = (
    *(entry(b"empty.%d" % kind, 9, array(kind, 0)) for kind in (*range(9), 10, 11, 12)),
    entry(b"latin", 8, struct.pack("<Q", 3) + b"\xe4\xff\0"),
    entry(b"words", 9, array(8, 2, struct.pack("<Q", 2) + b"\xc3\x28" + struct.pack("<Q", 0))),
    entry(b"k\xe4", 4, struct.pack("<I", 7)),
    entry(b"k\xe5", 7, b"\x02"),  # neither false nor true; and a key that reads as the one above
)


def with_entries(model: Path, target: Path, *entries: bytes) -> Path:
    """A copy with more keys at the front."""
    data = model.read_bytes()
    version, n_tensors, n_keys = struct.unpack_from("<IQQ", data, 4)
    # a last key as long as it takes to leave the tensors where their alignment has them
    filler = -(sum(map(len, entries)) + len(entry(b"fill", 8, bytes(8)))) % 32
    entries = (*entries, entry(b"fill", 8, struct.pack("<Q", filler) + b"x" * filler))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys + len(entries))
    target.write_bytes(head + b"".join(entries) + data[24:])
    return target


def split_in(model: Path, folder: Path, n_parts: int) -> list[Path]:
    """A model in parts, as llama.cpp's llama-gguf-split cuts it: the keys in the first one."""
    data, header = model.read_bytes(), read_header(model)
    names = list(header.tensors)
    size = -(-len(names) // n_parts)
    paths = []
    for part in range(n_parts):
        listed, placed = b"", b""
        for name in names[part * size : (part + 1) * size]:
            tensor = header.tensors[name]
            listed += data[tensor.entry] + struct.pack("<Q", len(placed))
            placed += data[tensor.start : tensor.end]
            placed += bytes(-len(placed) % header.alignment)
        keys = [data[each] for each in header.entries.values()] if part == 0 else []
        keys += [
            entry(b"split.no", 2, struct.pack("<H", part)),
            entry(b"split.count", 2, struct.pack("<H", n_parts)),
            entry(b"split.tensors.count", 5, struct.pack("<i", len(names))),
        ]
        n_tensors = len(names[part * size : (part + 1) * size])
        head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(keys)) + b"".join(keys) + listed
        paths.append(folder / f"{model.stem}-{part + 1:05}-of-{n_parts:05}.gguf")
        paths[-1].write_bytes(head + bytes(-len(head) % header.alignment) + placed)
    return paths


def test_what_need_not_be_understood_is_copied_byte_for_byte(
    model: Path, scores: Path, tmp_path: Path
) -> None:
    odd = with_entries(model, tmp_path / "odd.gguf", *ODD)
    copy, header = (
        convert(odd, scores, tmp_path / "copy.gguf", spec=BudgetSpec().override(budget=64)).path,
        read_header(odd),
    )
    data = copy.read_bytes()
    assert b"".join(ODD) in data
    again = read_header(copy)
    assert list(again.fields)[: len(header.fields)] == list(header.fields)
    assert [data[each] for each in again.entries.values()][: len(ODD)] == list(ODD)
    for name, tensor in header.tensors.items():
        assert (
            data[slice(again.tensors[name].start, again.tensors[name].end)]
            == (odd.read_bytes()[tensor.start : tensor.end])
        )
    # and again: its own keys are replaced, not doubled
    twice = convert(copy, scores, tmp_path / "twice.gguf", spec=BudgetSpec().override(budget=64)).path
    assert twice.read_bytes() == data


def test_llama_cpp_loads_what_was_copied(tmp_path: Path, sparsemm: CommandLine) -> None:
    from sparsemm_edge.demo import DemoModel

    files = DemoModel()
    odd = with_entries(files.model, tmp_path / "odd.gguf", *ODD)
    spec = BudgetSpec(budget=64, window=8)
    copy = convert(odd, files.scores, tmp_path / "copy.gguf", spec=spec, n_prompt=600).path
    texts = [
        sparsemm("generate", "-m", path, "-p", "What is it?", "-n", 8, "--threads", 1, "--json").report[
            "text"
        ]
        for path in (files.model, odd, copy)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert "(llama)" in sparsemm("inspect", copy).out


@pytest.mark.parametrize("n_parts", [2, 5])
def test_a_split_model_becomes_one_file(n_parts: int, tmp_path: Path, sparsemm: CommandLine) -> None:
    from sparsemm_edge.demo import DemoModel

    files = DemoModel()
    parts = split_in(files.model, tmp_path, n_parts)
    options = ("--scores", files.scores, "--budget", 64, "--window", 8)
    whole = tmp_path / "whole.gguf"
    assert sparsemm("convert", files.model, *options, "--out", whole).status == 0
    assert sparsemm("convert", parts[0], *options).status == 0
    assert (tmp_path / f"{files.model.stem}.sparsemm.gguf").read_bytes() == whole.read_bytes()
    # parts are run as they are, too
    arguments = (
        "--mmproj",
        files.mmproj,
        "--image",
        image_file(tmp_path),
        "-p",
        "Read it.",
        "-n",
        12,
        "--json",
    )
    answers = [
        sparsemm("generate", "-m", path, *arguments, *options, "--threads", 1).report["tokens"]
        for path in (parts[0], whole)
    ]
    assert answers[0] == answers[1]
    first = f"give its first part, {parts[0].name}"
    for command in (["convert", parts[1], *options], ["inspect", parts[1]], ["fit", parts[1]]):
        refusal = sparsemm(*command).refusal
        assert f"part 2 of {n_parts} of a split model" in refusal and first in refusal
    assert first in sparsemm("generate", "-m", parts[-1], "-p", "x").refusal
    parts[-1].unlink()
    assert f"cannot read {parts[-1]}" in sparsemm("convert", parts[0], *options, "--force").refusal


def image_file(folder: Path) -> Path:
    from sparsemm_edge.pages.grid import grid_page

    grid_page(2).image.save(folder / "page.png")
    return folder / "page.png"


def test_a_part_under_another_name_is_refused_with_the_names_that_parts_have(
    model: Path, scores: Path, tmp_path: Path
) -> None:
    part = split_in(model, tmp_path, 3)[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(SparseMMError, match=r"part 1 of 3 .* such as model-00001-of-00003\.gguf"):
        convert(part, scores)
    for key, value in (("split.no", "x"), ("split.count", 2**16 - 1)):
        kind = STRING if value == "x" else GGUFValueType.UINT16
        keys = {"split.count": (3, GGUFValueType.UINT16)} | {key: (value, kind)}
        with pytest.raises(SparseMMError, match=r"a part of a model|cannot read .*m-00002-of-65535\.gguf"):
            read_header(write_model(tmp_path / f"m-00001-of-{value}.gguf", keys=keys))  # type: ignore[arg-type]


def test_layers_that_predict_further_tokens_have_no_budgets(tmp_path: Path) -> None:
    """The KV cache of llama.cpp has no place for them: see n_layer_nextn in its hparams."""
    path = write_model(tmp_path / "m.gguf", keys={"llama.nextn_predict_layers": (1, U32)})
    assert model_shape(read_header(path)).n_layer == 1


LLAMA_WITHOUT_K = {key: value for key, value in attention_tensors().items() if "1.attn_k" not in key}


@pytest.mark.parametrize(
    ("model_arguments", "reason"),
    [
        (
            {"tensors": LLAMA_WITHOUT_K},
            r"missing tensors: blk\.1\.attn_k\.weight \(a llama model of 2 layers",
        ),
        ({"tensors": {}}, r"missing tensors: token_embd\.weight, .* and more"),
        (
            {"arch": "mamba"},
            "unsupported architecture 'mamba'; supported: gemma3, gemma4, glm4, glm4moe, granite",
        ),
        ({"arch": "gemma2"}, "unsupported architecture 'gemma2'"),
        (
            {"arch": "lfm2", "keys": {"lfm2.attention.sliding_window": (4096, U32)}},
            "it has a sliding window",
        ),
        (
            {"arch": "lfm2", "keys": {"lfm2.attention.head_count_kv": ([0, 0], GGUFValueType.ARRAY)}},
            "this lfm2 model has no layer with full attention",
        ),
        (
            {"arch": "lfm2", "keys": {"lfm2.attention.head_count_kv": ([2], GGUFValueType.ARRAY)}},
            "head_count_kv has 1 entries, the model has 2 layers",
        ),
        ({"arch": "qwen35"}, "this qwen35 model has no layer with full attention"),
        (
            {"arch": "qwen35", "keys": {"qwen35.full_attention_interval": (0, U32)}},
            "full_attention_interval is 0, expected a positive whole number",
        ),
        (
            {"arch": "qwen35", "keys": {"qwen35.block_count": (2**32 - 1, U32)}},
            "block_count is 4294967295, llama.cpp runs 512 at most",
        ),
        (
            {"arch": "deepseek2"},
            r"'deepseek2' \(latent attention \(MLA\) has one K and V for all heads\); supported:",
        ),
        ({"arch": "clip"}, r"this is an image encoder \(mmproj\)"),
        ({"keys": {"llama.attention.sliding_window": (4096, U32)}}, "it has a sliding window"),
        ({"keys": {"llama.attention.kv_lora_rank": (512, U32)}}, r"latent attention \(MLA\)"),
        ({"keys": {"llama.nextn_predict_layers": (2, U32)}}, "leaves no layer of block_count"),
        ({"keys": {"split.count": (3, GGUFValueType.UINT16)}}, "part 1 of 3 of a split model"),
        (
            {"keys": {"llama.attention.head_count_kv": ([2, 1], GGUFValueType.ARRAY)}},
            "head_count_kv differs between layers",
        ),
        ({"keys": {"llama.block_count": (2**32 - 1, U32)}}, r"missing tensors: blk\.2\.attn_q\.weight"),
        ({"keys": {"llama.block_count": (0, U32)}}, "block_count is 0"),
        ({"keys": {"llama.block_count": ("2", STRING)}}, "block_count is '2'"),
        ({"n_head_kv": 3}, "4 query heads cannot be divided among 3 KV heads"),
        ({"endianess": gguf.GGUFEndian.BIG}, "a big-endian GGUF file"),
        ({"n_layer": 3}, r"they are for 2 layers x 4 heads, the model has 3 layers x 4 heads \(2 KV heads\)"),
        ({"n_head": 8}, r"they are for 2 layers x 4 heads, the model has 2 layers x 8 heads \(2 KV heads\)"),
    ],
)
def test_a_model_that_cannot_be_converted(
    tmp_path: Path, scores: Path, model_arguments: dict[str, object], reason: str
) -> None:
    model = write_model(tmp_path / "tiny.gguf", **model_arguments)  # type: ignore[arg-type]
    with pytest.raises(SparseMMError, match=reason) as caught:
        convert(model, scores)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.json", "tiny.gguf"]


@pytest.mark.parametrize(
    "model_arguments",
    [
        {"keys": {"llama.attention.sliding_window": (0, U32)}},
        {"keys": {"llama.attention.head_count_kv": ([2, 2], GGUFValueType.ARRAY)}},
        {"keys": {"split.count": (1, GGUFValueType.UINT16)}},
        {"keys": {"split.count": (0, GGUFValueType.UINT16)}},
        {"arch": "qwen2vl"},
        {
            "tensors": {
                name.replace("attn_q", "attn_qkv"): tensor
                for name, tensor in attention_tensors().items()
                if "attn_k" not in name and "attn_v" not in name
            }
        },
    ],
)
def test_a_model_that_only_looks_unusual_is_converted(
    tmp_path: Path, scores: Path, model_arguments: dict[str, object]
) -> None:
    model = write_model(tmp_path / "tiny.gguf", **model_arguments)  # type: ignore[arg-type]
    assert sparsemm_metadata(read_header(convert(model, scores).path)) is not None


ARRAY = GGUFValueType.ARRAY
LAYERS = {
    "qwen35, by its interval": ("qwen35", {"qwen35.full_attention_interval": (3, U32)}, [2, 5]),
    "qwen35, an interval of 4": ("qwen35", {}, [3]),
    "qwen35, a list, and a layer that does not run": (
        "qwen35",
        {
            "qwen35.attention.recurrent_layers": ([True, False, True, True, False, False], ARRAY),
            "qwen35.nextn_predict_layers": (1, U32),
        },
        [1, 4],
    ),
    "qwen35moe": ("qwen35moe", {"qwen35moe.full_attention_interval": (2, U32)}, [1, 3, 5]),
    "lfm2": ("lfm2", {"lfm2.attention.head_count_kv": ([0, 0, 2, 0, 2, 0], ARRAY)}, [2, 4]),
    "gemma3": ("gemma3", {"gemma3.attention.sliding_window": (512, U32)}, [5]),
    "gemma3, a pattern": (
        "gemma3",
        {
            "gemma3.attention.sliding_window": (512, U32),
            "gemma3.attention.sliding_window_pattern": (3, U32),
        },
        [2, 5],
    ),
    "gemma4, other heads where it slides, and layers that share": (
        "gemma4",
        {
            "gemma4.attention.sliding_window": (512, U32),
            "gemma4.attention.sliding_window_pattern": ([True, False, True, False, True, False], ARRAY),
            "gemma4.attention.head_count_kv": ([4, 2, 4, 2, 4, 2], ARRAY),
            "gemma4.attention.shared_kv_layers": (2, U32),
            "gemma4.attention.key_length": (16, U32),
        },
        [1, 3],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_only_layers_with_full_attention_have_budgets(tmp_path: Path, name: str) -> None:
    arch, keys, layers = LAYERS[name]
    parts = ("attn_q", "attn_k", "attn_v", "attn_output")
    named = {f"blk.{layer}.{part}.weight" for layer in layers for part in parts} | {"token_embd.weight"}
    tensors = {name: tensor for name, tensor in attention_tensors(6).items() if name in named}
    model = write_model(tmp_path / "tiny.gguf", arch=arch, n_layer=6, keys=keys, tensors=tensors)
    shape = model_shape(read_header(model))
    assert list(shape.layer_numbers) == layers
    assert shape.kv_heads == (len(layers), 2)
    assert (shape.n_embd_head_k, shape.n_embd_head_v) == (16 if arch == "gemma4" else 8, 8)

    scores = write_scores(tmp_path / "scores.json", [[1.0, 2.0, 3.0, 4.0]] * len(layers))
    path = convert(model, scores).path
    fields = gguf.GGUFReader(path).fields
    assert fields["sparsemm.layers"].contents() == layers
    assert len(fields["sparsemm.head_budgets"].contents()) == 2 * len(layers)
    metadata = sparsemm_metadata(read_header(path))
    assert metadata is not None and metadata.layers == tuple(layers)

    too_many = write_scores(tmp_path / "all.json", [[1.0, 2.0, 3.0, 4.0]] * 6)
    with pytest.raises(SparseMMError, match=rf"6 layers x 4 heads, the model has {len(layers)} layers"):
        convert(model, too_many, force=True)


def test_a_table_of_other_layers_is_refused(tmp_path: Path) -> None:
    keys = {"lfm2.attention.head_count_kv": ([0, 2, 2, 0, 0, 0], ARRAY)}
    model = write_model(
        tmp_path / "tiny.gguf", arch="lfm2", n_layer=6, keys=keys, tensors=attention_tensors(6)
    )
    path = convert(model, write_scores(tmp_path / "scores.json", SCORES)).path
    data = path.read_bytes()
    named = b"sparsemm.layers" + struct.pack("<IIQII", ARRAY, U32, 2, 1, 2)
    assert data.count(named) == 1
    path.write_bytes(data.replace(named, named[:-4] + struct.pack("<I", 3)))
    with pytest.raises(SparseMMError, match="layers does not name the layers with full attention"):
        sparsemm_metadata(read_header(path))


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ([[1.0, 2.0, 3.0, float("nan")], [1.0] * 4], "layer 0, head 3 is not finite"),
        ([[1.0, -2.0, 3.0, 4.0], [1.0] * 4], "layer 0, head 1 is negative"),
        ([[0.0] * 4, [0.0] * 4], "all scores are zero"),
    ],
)
def test_scores_that_mean_nothing(model: Path, tmp_path: Path, table: list[list[float]], reason: str) -> None:
    with pytest.raises(SparseMMError, match=rf"bad\.json: .*{reason}"):
        convert(model, write_scores(tmp_path / "bad.json", table))


def test_scores_of_another_gqa_shape_do_not_fit(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SparseMMError, match=r"2 layers x 4 heads \(4 KV heads\), the model has"):
        convert(model, write_scores(tmp_path / "s.json", SCORES, n_head_kv=4))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"spec": BudgetSpec(budget=32, window=32)}, "must be larger than the window"),
        ({"spec": BudgetSpec("full")}, "policy full evicts nothing"),
        ({"spec": BudgetSpec("best")}, "unknown policy 'best'"),
        ({"out": Path("nowhere/out.gguf")}, "there is no directory nowhere"),
    ],
)
def test_settings_that_cannot_be(model: Path, scores: Path, settings: dict[str, object], reason: str) -> None:
    with pytest.raises(SparseMMError, match=reason):
        convert(model, scores, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"GG", b"GGML" * 20, b"PK\x03\x04" * 20])
def test_a_file_that_is_no_gguf(tmp_path: Path, scores: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(SparseMMError, match=r"model\.gguf: not a GGUF file"):
        convert(path, scores)


def test_paths_that_cannot_be_read(tmp_path: Path, scores: Path) -> None:
    with pytest.raises(SparseMMError, match=r"cannot read .*missing\.gguf: No such file"):
        convert(tmp_path / "missing.gguf", scores)
    with pytest.raises(SparseMMError, match=r"cannot read .*: Is a directory"):
        convert(tmp_path, scores)


def test_the_command_reports_as_json(model: Path, scores: Path, sparsemm: CommandLine) -> None:
    arguments = ("convert", model, "--scores", scores, "--budget", 64, "--window", 8, "--no-water-fill")
    done = sparsemm(*arguments, "--policy", "pyramid", "--floor-ratio", 0.25, "--json")
    report = done.report
    assert report["path"] == str(model.with_name("tiny.sparsemm.gguf"))
    wanted = {"policy": "pyramid", "budget": 64, "window": 8, "floor_ratio": 0.25, "water_fill_length": 0}
    assert report["sparsemm"] | wanted == report["sparsemm"]
    assert report["sparsemm"]["head_budgets"]["mean"] == 64
    assert done.err == ""  # a progress bar is for terminals


def test_a_mistake_is_one_line_on_stderr_and_status_2(
    model: Path, scores: Path, sparsemm: CommandLine
) -> None:
    done = sparsemm("convert", model, "--scores", scores, "--budget", 20, "--window", 32)
    assert done.refusal == "error: the budget (20) must be larger than the window (32) it includes"
    assert done.err == done.refusal + "\n"
    usage = sparsemm("convert", model)
    assert usage.status == 2 and "--scores" in usage.err


def test_converting_and_inspecting_load_no_model_library() -> None:
    program = (
        "import sys, sparsemm_edge, sparsemm_edge.cli, sparsemm_edge.convert, sparsemm_edge.inspection,"
        " sparsemm_edge.reports.head_map;"
        " print([m for m in ('torch', 'transformers', 'llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
