"""llama.cpp sees what the Hugging Face model sees, whichever layers an mmproj file stores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from helpers.models import ROOT, TestModel, sample_image
from helpers.native import Native
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.mmproj import convert_mmproj

TOLERANCE = 1e-2  # relative L2 error per token at f16; measured: below 2e-3


def hf_features(hf_dir: Path, image_size: int, **options: Any) -> np.ndarray:
    """`get_image_features` of the test image: float32 [image tokens, n_embd]."""
    model = LlavaForConditionalGeneration.from_pretrained(hf_dir, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(hf_dir)
    pixels = torch.tensor(np.asarray(processor(sample_image(image_size, 7))["pixel_values"]))
    with torch.no_grad():
        return model.get_image_features(pixels, **options).pooler_output[0].numpy()


def mtmd_features(model: Path, mmproj: Path, image_size: int) -> np.ndarray:
    with Native(model, mmproj) as native:
        return native.image_embeddings(sample_image(image_size, 7))


def errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative L2 error of each token."""
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)


Fields = dict[str, Any]
Tensors = dict[str, np.ndarray]


def rewrite(source: Path, target: Path, change: Callable[[Fields, Tensors], None]) -> Path:
    """Copy an mmproj file with other metadata and tensors: the files that other converters make."""
    reader = gguf.GGUFReader(source)
    kinds = {name: field.types[0] for name, field in reader.fields.items()}
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    change(fields, tensors)
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture"))
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, kinds[name])
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def with_feature_layer(hf_dir: Path, target: Path, layer: int | list[int]) -> Path:
    """The same checkpoint, read at another layer."""
    shutil.copytree(hf_dir, target)
    config = json.loads((target / "config.json").read_text())
    config["vision_feature_layer"] = layer
    (target / "config.json").write_text(json.dumps(config))
    return target


# --- image embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("outtype", ["f16", "f32"])
@pytest.mark.parametrize("name", ["llava", "llava-gqa", "llava-siglip"])
def test_image_embeddings_equal_those_of_the_checkpoint(name: str, outtype: str, models: Any) -> None:
    model: TestModel = models(name)
    found = mtmd_features(model.gguf(outtype), model.mmproj(outtype), model.image_size)
    assert errors(found, hf_features(model.hf, model.image_size)).max() < TOLERANCE


def test_a_file_that_drops_the_last_layer_and_states_nothing_runs_all_it_stores(
    models: Any, tmp_path: Path
) -> None:
    """llama.cpp's legacy converter: what it stores, without post-norm, is what LLaVA reads."""
    model: TestModel = models("llava")

    def legacy(fields: Fields, tensors: Tensors) -> None:
        del fields["clip.vision.feature_layer"]

    mmproj = rewrite(model.mmproj("f16"), tmp_path / "legacy.gguf", legacy)
    found = mtmd_features(model.gguf("f16"), mmproj, model.image_size)
    assert errors(found, hf_features(model.hf, model.image_size)).max() < TOLERANCE


@pytest.mark.parametrize("stated", [[3], [-2]])
def test_a_file_with_all_layers_stops_at_the_layer_that_it_states(
    stated: list[int], models: Any, tmp_path: Path
) -> None:
    model: TestModel = models("llava")
    whole = tmp_path / "whole.gguf"
    convert_mmproj(with_feature_layer(model.hf, tmp_path / "hf", -1), whole)
    assert gguf.GGUFReader(whole).fields["clip.vision.block_count"].contents() == 4

    def state(fields: Fields, tensors: Tensors) -> None:
        fields["clip.vision.feature_layer"] = stated

    mmproj = rewrite(whole, tmp_path / "stated.gguf", state)
    found = mtmd_features(model.gguf("f16"), mmproj, model.image_size)
    assert errors(found, hf_features(model.hf, model.image_size)).max() < TOLERANCE


@pytest.mark.parametrize("layer", [-1, -4, 2])
def test_one_other_layer_is_read_where_the_checkpoint_says_so(
    layer: int, models: Any, tmp_path: Path
) -> None:
    model: TestModel = models("llava-gqa")
    hf_dir = with_feature_layer(model.hf, tmp_path / "hf", layer)
    tower = convert_mmproj(hf_dir, tmp_path / "mmproj.gguf")
    assert tower.n_layer == tower.feature_layers[0] == (layer if layer >= 0 else 5 + layer)
    found = mtmd_features(model.gguf("f16"), tmp_path / "mmproj.gguf", model.image_size)
    assert errors(found, hf_features(hf_dir, model.image_size)).max() < TOLERANCE


def test_several_layers_of_a_tower_with_class_token_are_concatenated(models: Any, tmp_path: Path) -> None:
    model: TestModel = models("llava")
    hf_dir = with_feature_layer(model.hf, tmp_path / "hf", [1, 3])
    weights = load_file(hf_dir / "model.safetensors")
    name = next(n for n in weights if n.endswith("linear_1.weight"))
    weights[name] = torch.cat([weights[name], weights[name].flip(0)], dim=1)
    save_file(weights, hf_dir / "model.safetensors", metadata={"format": "pt"})
    tower = convert_mmproj(hf_dir, tmp_path / "mmproj.gguf")
    assert tower.feature_layers == (1, 3)
    found = mtmd_features(model.gguf("f16"), tmp_path / "mmproj.gguf", model.image_size)
    assert errors(found, hf_features(hf_dir, model.image_size)).max() < TOLERANCE


def test_a_file_with_post_norm_and_its_last_layer_twice_keeps_working(models: Any, tmp_path: Path) -> None:
    """moondream2's published file: it was made for a graph that skips the last stored layer."""
    model: TestModel = models("llava-siglip")
    hf_dir = with_feature_layer(model.hf, tmp_path / "hf", -1)
    weights = load_file(hf_dir / "model.safetensors")
    name = next(n for n in weights if n.endswith("linear_1.weight"))
    weights[name] = weights[name][:, :64].contiguous()
    save_file(weights, hf_dir / "model.safetensors", metadata={"format": "pt"})
    whole = tmp_path / "whole.gguf"
    convert_mmproj(hf_dir, whole)

    def moondream(fields: Fields, tensors: Tensors) -> None:
        del fields["clip.vision.feature_layer"]
        fields["clip.vision.block_count"] += 1
        for tensor in [t for t in tensors if t.startswith("v.blk.3.")]:
            tensors[tensor.replace("v.blk.3.", "v.blk.4.")] = tensors[tensor]
        for part in ("weight", "bias"):
            key = next(n for n in weights if n.endswith(f"post_layernorm.{part}"))
            tensors[f"v.post_ln.{part}"] = weights[key].numpy()

    mmproj = rewrite(whole, tmp_path / "moondream.gguf", moondream)
    found = mtmd_features(model.gguf("f16"), mmproj, model.image_size)

    hf = LlavaForConditionalGeneration.from_pretrained(hf_dir, dtype=torch.float32).eval()
    pixels = AutoImageProcessor.from_pretrained(hf_dir)(sample_image(model.image_size, 7))["pixel_values"]
    with torch.no_grad():
        states = hf.model.vision_tower(torch.tensor(np.asarray(pixels))).last_hidden_state
        expected = hf.model.multi_modal_projector(states)[0].numpy()
    assert errors(found, expected).max() < TOLERANCE


# --- the converter ------------------------------------------------------------------------------------


def test_all_spellings_of_a_checkpoint_give_the_same_file(models: Any, tmp_path: Path) -> None:
    """transformers 5 saves `vision_tower.`, version 4 `vision_tower.vision_model.`, or `model.` first."""
    model: TestModel = models("llava")
    expected = tensors_of(model.mmproj("f16"))
    weights = load_file(model.hf / "model.safetensors")
    renamings: list[Callable[[str], str]] = [
        lambda n: n.replace("vision_tower.", "vision_tower.vision_model."),
        lambda n: "model." + n if n.startswith(("vision_tower", "multi_modal")) else n,
    ]
    for i, renamed in enumerate(renamings):
        hf_dir = tmp_path / str(i)
        shutil.copytree(model.hf, hf_dir)
        save_file({renamed(n): w for n, w in weights.items()}, hf_dir / "model.safetensors")
        convert_mmproj(hf_dir, tmp_path / f"{i}.gguf")
        found = tensors_of(tmp_path / f"{i}.gguf")
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[n], expected[n]) for n in expected)


def tensors_of(path: Path) -> Tensors:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def test_bf16_and_sharded_checkpoints_convert(models: Any, tmp_path: Path) -> None:
    model: TestModel = models("llava")
    hf_dir = tmp_path / "hf"
    shutil.copytree(model.hf, hf_dir)
    weights = {n: w.bfloat16() for n, w in load_file(hf_dir / "model.safetensors").items()}
    (hf_dir / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({n: weights[n] for n in held}, hf_dir / file)
    index = {"weight_map": {n: file for file, held in shards.items() for n in held}}
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps(index))

    convert_mmproj(hf_dir, tmp_path / "mmproj.gguf", outtype="f32")
    found = tensors_of(tmp_path / "mmproj.gguf")
    name = next(n for n in weights if n.endswith("layers.2.mlp.fc1.weight"))
    assert np.array_equal(found["v.blk.2.ffn_up.weight"], weights[name].float().numpy())

    (hf_dir / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SparseMMError, match=r"lacks model-00002-of-00002\.safetensors"):
        convert_mmproj(hf_dir, tmp_path / "mmproj.gguf", force=True)


def test_llava_next_states_grid_merge_type_and_newline(models: Any, tmp_path: Path) -> None:
    model: TestModel = models("llava")
    hf_dir = tmp_path / "hf"
    shutil.copytree(model.hf, hf_dir)
    config = json.loads((hf_dir / "config.json").read_text())
    config |= {"model_type": "llava_next", "image_grid_pinpoints": [[112, 224], [336, 112]]}
    (hf_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseMMError, match="image_newline is missing"):
        convert_mmproj(hf_dir, tmp_path / "mmproj.gguf")

    weights = load_file(hf_dir / "model.safetensors") | {"image_newline": torch.arange(128.0)}
    save_file(weights, hf_dir / "model.safetensors")
    convert_mmproj(hf_dir, tmp_path / "mmproj.gguf")
    fields = gguf.GGUFReader(tmp_path / "mmproj.gguf").fields
    assert fields["clip.vision.image_grid_pinpoints"].contents() == [224, 112, 112, 336]
    assert fields["clip.vision.mm_patch_merge_type"].contents() == "spatial_unpad"
    assert np.array_equal(tensors_of(tmp_path / "mmproj.gguf")["v.image_newline"], np.arange(128.0))
    found = mtmd_features(model.gguf("f16"), tmp_path / "mmproj.gguf", model.image_size)
    # an image no larger than the tower is its own overview, and nothing else
    assert errors(found, hf_features(model.hf, model.image_size)).max() < TOLERANCE


Change = Callable[[Path, dict[str, Any]], None]


def set_key(key: str, value: Any) -> Change:
    return lambda hf_dir, config: config.update({key: value})


def set_vision_key(key: str, value: Any) -> Change:
    return lambda hf_dir, config: config["vision_config"].update({key: value})


def remove(name: str) -> Change:
    return lambda hf_dir, config: (hf_dir / name).unlink()


def cut_short(hf_dir: Path, config: dict[str, Any]) -> None:
    path = hf_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200_000])


def text_only(hf_dir: Path, config: dict[str, Any]) -> None:
    config["model_type"] = "llama"
    del config["vision_config"]


def drop_tensor(hf_dir: Path, config: dict[str, Any]) -> None:
    weights = load_file(hf_dir / "model.safetensors")
    del weights[next(n for n in weights if n.endswith("layers.1.mlp.fc2.bias"))]
    save_file(weights, hf_dir / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_key("model_type", "qwen2_vl"), "convert_hf_to_gguf.py --mmproj"),
        (text_only, "model_type is 'llama' and there is no vision_config"),
        (set_key("mm_vision_tower", "openai/clip"), "authors' own layout"),
        (set_vision_key("model_type", "pixtral"), "the vision tower is 'pixtral'"),
        (set_vision_key("hidden_act", "relu"), "hidden_act of the vision tower is 'relu'"),
        (set_key("vision_feature_select_strategy", "full"), "vision_feature_select_strategy is 'full'"),
        (set_key("vision_feature_layer", -9), "does not fit a tower of 4 layers"),
        (set_key("vision_feature_layer", [3, 1]), "not in ascending order"),
        (set_key("projector_hidden_act", "relu"), "llama.cpp computes gelu"),
        (set_vision_key("hidden_size", 96), "config.json implies"),
        (set_vision_key("hidden_size", "96"), "hidden_size of the vision tower is '96'"),
        (set_vision_key("image_size", 0), "image_size of the vision tower is 0"),
        (set_vision_key("layer_norm_eps", None), "layer_norm_eps of the vision tower is None"),
        (set_vision_key("hidden_act", []), "hidden_act of the vision tower is []"),
        (set_vision_key("model_type", {}), "the vision tower is {}"),
        (set_key("vision_feature_layer", ["x"]), "vision_feature_layer is ['x']"),
        (set_key("vision_feature_layer", None), "vision_feature_layer is [None]"),
        (remove("model.safetensors"), "has no *.safetensors"),
        (remove("processor_config.json"), "has no preprocessor_config.json"),
        (cut_short, "cut short"),
        (drop_tensor, "layers.1.mlp.fc2.bias is missing"),
    ],
)
def test_what_cannot_be_converted_is_named_in_one_line(
    change: Change, message: str, models: Any, tmp_path: Path
) -> None:
    model: TestModel = models("llava")
    hf_dir = tmp_path / "hf"
    shutil.copytree(model.hf, hf_dir)
    config = json.loads((hf_dir / "config.json").read_text())
    change(hf_dir, config)
    (hf_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseMMError) as caught:
        convert_mmproj(hf_dir, tmp_path / "mmproj.gguf")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"], "nothing half-written stays behind"


def test_an_existing_file_is_replaced_only_by_force(models: Any, tmp_path: Path) -> None:
    model: TestModel = models("llava")
    out = tmp_path / "mmproj.gguf"
    out.write_text("mine")
    with pytest.raises(SparseMMError, match="use --force"):
        convert_mmproj(model.hf, out)
    assert out.read_text() == "mine"
    convert_mmproj(model.hf, out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SparseMMError, match=r"has no config\.json"):
        convert_mmproj(tmp_path, tmp_path / "mmproj.gguf")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_configuration_may_have_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    demo, marked = ROOT / "models" / "demo", tmp_path / "marked"
    marked.mkdir()
    for file in demo.iterdir():
        if file.suffix == ".json":
            (marked / file.name).write_text(file.read_text(encoding="utf-8"), encoding=encoding)
        else:
            (marked / file.name).symlink_to(file)
    plain = convert_mmproj(demo, tmp_path / "plain.gguf")
    same = convert_mmproj(marked, tmp_path / "marked.gguf")
    assert plain == same
    assert (tmp_path / "plain.gguf").stat().st_size == (tmp_path / "marked.gguf").stat().st_size
