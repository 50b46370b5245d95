"""`inspect`: says what a file holds, that it holds nothing, or what is wrong with what it holds."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from PIL import Image

from helpers.command_line import CommandLine
from helpers.tiny_gguf import write_model
from sparsemm_edge import SparseMMError
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.convert import convert
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import SparseMMMetadata, sparsemm_metadata
from sparsemm_edge.reports.head_map import save_head_map

U32, STRING, ARRAY = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY
SCORES = {"0-0": [0], "0-1": [1], "0-2": [2], "0-3": [3], "1-0": [40], "1-1": [5], "1-2": [6], "1-3": [7]}


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """2 layers x 2 KV heads, B = 64, w = 8, floor 5, water-filled for 100 positions."""
    model = write_model(tmp_path / "tiny.gguf")
    scores = tmp_path / "tiny.head-scores.json"
    scores.write_text(json.dumps(SCORES))
    return convert(model, scores, spec=BudgetSpec(budget=64, window=8), n_prompt=100).path


def test_the_figures_are_those_of_the_table(converted: Path, sparsemm: CommandLine) -> None:
    report = sparsemm("inspect", converted, "--json").report
    metadata = sparsemm_metadata(read_header(converted))
    assert metadata is not None
    table = metadata.head_budgets
    # shares 1, 5, 45 and 13 of 64: the third is full at 100, the others share 96 above the floor
    assert table.ravel().tolist() == [25, 45, 100, 86]
    assert report["sparsemm"]["head_budgets"] == {
        "min": int(table.min()),
        "median": float(np.median(table)),
        "mean": 64.0,
        "max": 100,
        "heads_at_floor": 0.0,
    }
    assert (report["sparsemm"]["n_layer"], report["sparsemm"]["n_head_kv"]) == (2, 2)
    # f16, head size 8: 32 bytes of K and V a position; at 640 positions a table for 100 is kept whole
    assert report["kv_bytes"]["full"]["640"] == 4 * 640 * 32
    assert {report["kv_bytes"][row]["640"] for row in ("as stored", "sparsemm", "pyramid")} == {4 * 64 * 32}


def test_a_table_that_was_not_water_filled_is_shown_with_what_it_wastes(
    converted: Path, sparsemm: CommandLine
) -> None:
    plain = converted.with_name("plain.gguf")
    scores = converted.with_name("tiny.head-scores.json")
    convert(converted, scores, plain, spec=BudgetSpec(budget=600, window=8, water_fill=False))
    metadata = sparsemm_metadata(read_header(plain))
    assert metadata is not None
    kept = int(np.minimum(metadata.head_budgets, 640).sum())
    assert kept < 4 * 600
    report = sparsemm("inspect", plain, "--json").report
    assert report["kv_bytes"]["as stored"]["640"] == report["kv_bytes"]["sparsemm"]["640"] == kept * 32
    assert report["kv_bytes"]["uniform"]["640"] == 4 * 600 * 32


def test_a_person_sees_shape_policy_table_and_savings(converted: Path, sparsemm: CommandLine) -> None:
    done = sparsemm("inspect", converted)
    assert done.status == 0
    for piece in (
        "Tiny (llama), 2 layers, 4 query heads, 2 KV heads",
        "64 positions per KV head",
        "window 8",
        "prompt of 100 positions",
        "max 100",
        "data set unknown",
        "2944 positions",
        "pyramid",
    ):
        assert piece in done.out


def test_a_file_without_metadata_is_said_to_hold_none(converted: Path, sparsemm: CommandLine) -> None:
    model = converted.with_name("tiny.gguf")
    done = sparsemm("inspect", model)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"{model} holds no sparsemm metadata")
    assert sparsemm("inspect", model, "--json").report["sparsemm"] is None
    refusal = sparsemm("inspect", model, "--plot", converted.with_name("map.png")).refusal
    assert refusal == f"error: {model} holds no sparsemm metadata, so there is no head map to draw"


def test_inspect_draws_the_head_map(converted: Path, sparsemm: CommandLine) -> None:
    picture = converted.with_name("map.png")
    done = sparsemm("inspect", converted, "--plot", picture)
    assert (done.status, f"wrote {picture}" in done.out) == (0, True)
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_the_head_map_has_layers_down_and_heads_across(tmp_path: Path) -> None:
    table = np.full((4, 4), 30)
    table[3, 0] = 10  # darkest: last layer, first head
    table[0, 3] = 1000  # brightest: first layer, last head
    save_head_map(table, tmp_path / "map.png", title="corners")
    with Image.open(tmp_path / "map.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    pixels = pixels[:, : pixels.shape[1] * 7 // 10]  # without the colour bar

    def centre(colour: tuple[int, int, int]) -> np.ndarray:
        here = np.argwhere(np.abs(pixels - colour).max(axis=2) <= 1)
        assert len(here) > 100
        return here.mean(axis=0)

    (low_y, low_x), (high_y, high_x) = centre((68, 1, 84)), centre((253, 231, 37))  # the ends of viridis
    assert low_y > high_y + 100
    assert low_x < high_x - 50


def test_a_table_of_one_value_can_be_drawn(tmp_path: Path) -> None:
    save_head_map(np.full((40, 8), 256, dtype=np.uint32), tmp_path / "map.png", title="uniform")
    assert Image.open(tmp_path / "map.png").size > (100, 100)


def test_the_head_map_is_a_png(tmp_path: Path) -> None:
    with pytest.raises(SparseMMError, match=r"map\.jpg must end in \.png"):
        save_head_map(np.ones((2, 2), dtype=np.uint32), tmp_path / "map.jpg", title="")


METADATA = SparseMMMetadata(
    spec=BudgetSpec("uniform", 64, 8, 0.1, vote="snapkv", residual=False, water_fill=False),
    head_budgets=np.full((2, 2), 64, dtype=np.uint32),
    head_scores=np.full((2, 4), 1 / 8, dtype=np.float32),
    scores_source="test",
    water_fill_length=0,
)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("budget", None, r"sparsemm\.budget is missing"),
        ("version", None, r"sparsemm\.version is missing"),
        ("version", (2, U32), "metadata of version 2; this program reads 1"),
        ("budget", ("64", STRING), r"sparsemm\.budget is not of type uint32"),
        ("budget", (64, GGUFValueType.INT32), r"sparsemm\.budget is not of type uint32"),
        ("budget", ([64], ARRAY), r"sparsemm\.budget is not of type uint32"),
        ("head_budgets", (64, U32), r"sparsemm\.head_budgets is not of type array of uint32"),
        ("head_budgets", ([64] * 4, ARRAY), r"sparsemm\.head_budgets is not of type array of uint32"),
        ("head_scores", ([0.25] * 4, ARRAY), r"head_scores has 4 entries, the model needs 8"),
        ("head_scores", ([0.0] * 8, ARRAY), "head_scores must be finite"),
        ("head_scores", ([float("nan")] * 8, ARRAY), "head_scores must be finite"),
        ("policy", ("best", STRING), r"sparsemm\.policy is 'best'"),
        ("window", (0, U32), r"sparsemm\.window is 0"),
        ("window", (64, U32), r"sparsemm\.window is 64 with a sparsemm\.budget of 64"),
        ("budget", (70, U32), None),
        ("window", (63, U32), None),
        ("pool_kernel", (4, U32), r"sparsemm\.pool_kernel is 4, expected an odd number"),
        ("floor_ratio", (1.5, GGUFValueType.FLOAT32), r"sparsemm\.floor_ratio is 1\.5"),
        ("enabled", (1, U32), r"sparsemm\.enabled is not of type bool"),
    ],
)
def test_broken_metadata_is_one_line(
    tmp_path: Path, key: str, value: tuple[object, GGUFValueType] | None, reason: str | None
) -> None:
    path = write_with_metadata(tmp_path / "broken.gguf", {key: value})
    if reason is None:
        assert sparsemm_metadata(read_header(path)) is not None
        return
    with pytest.raises(SparseMMError, match=reason) as caught:
        sparsemm_metadata(read_header(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_head_budget_below_the_window_is_broken(tmp_path: Path) -> None:
    path = write_with_metadata(tmp_path / "broken.gguf", {}, head_budgets=[64, 64, 64, 7])
    with pytest.raises(SparseMMError, match=r"head_budgets holds 7, below the window \(8\)"):
        sparsemm_metadata(read_header(path))


def test_a_table_of_another_models_size_is_broken(tmp_path: Path) -> None:
    path = write_with_metadata(tmp_path / "broken.gguf", {}, head_budgets=[64] * 6)
    with pytest.raises(SparseMMError, match="head_budgets has 6 entries, the model needs 4"):
        sparsemm_metadata(read_header(path))


def write_with_metadata(
    path: Path,
    changes: dict[str, tuple[object, GGUFValueType] | None],
    head_budgets: list[int] | None = None,
) -> Path:
    """A 2-layer model with METADATA, some of its keys changed or (None) left out."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("block_count", 2), ("embedding_length", 32)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, field in METADATA.fields().items():
        if name.removeprefix("sparsemm.") not in changes:
            value = head_budgets if head_budgets and name == "sparsemm.head_budgets" else field.value
            writer.add_key_value(name, value, field.type, field.item_type)
    for key, change in changes.items():
        if change is not None:
            writer.add_key_value(f"sparsemm.{key}", *change)
    writer.add_tensor("token_embd.weight", np.zeros((2, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_no_text_model_is_named_as_what_it_is(tmp_path: Path, sparsemm: CommandLine) -> None:
    mmproj = write_model(tmp_path / "mmproj.gguf", arch="clip")
    assert "this is an image encoder (mmproj)" in sparsemm("inspect", mmproj).refusal
    keys = {"general.type": ("adapter", GGUFValueType.STRING)}
    assert "adapter (LoRA)" in sparsemm("inspect", write_model(tmp_path / "lora.gguf", keys=keys)).refusal  # type: ignore[arg-type]
