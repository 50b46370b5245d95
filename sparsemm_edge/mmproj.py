"""Convert the vision tower and projector of a LLaVA checkpoint to mmproj.gguf for llama.cpp's mtmd.

llama.cpp's own converter makes the text model of a LLaVA checkpoint but refuses its CLIP tower. This
module writes the other half from a Hugging Face folder of LLaVA-1.5 or LLaVA-NeXT (transformers layout,
safetensors), with CLIP or SigLIP tower. It reads the tensors with gguf's own safetensors reader: no torch.

Only the layers that run are written. LLaVA reads the tower before its end (`vision_feature_layer` -2), so
the last layer and the final layer norm are unused. Readers disagree on files without
`clip.vision.feature_layer`, so it always states which hidden states are read, counted from 0 = the input of
the first layer.
"""

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.utility import LocalTensor, SafetensorsLocal

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import atomic_path, read_json

OUTTYPES = ("f16", "f32")

# What transformers assumes where a config.json is silent (it leaves out what equals its defaults).
_CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP_CHANGES = {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TOWER_DEFAULTS = {
    "clip_vision_model": _CLIP_DEFAULTS,
    "siglip_vision_model": _CLIP_DEFAULTS | _SIGLIP_CHANGES,
}

# LLaVA-NeXT's grid of resolutions (height, width), transformers' default.
_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

# mtmd reads any other activation as quick_gelu; its gelu is the tanh form, which stands for the exact one
# within f16 accuracy
_USE_GELU = {"quick_gelu": False, "gelu": True, "gelu_new": True, "gelu_pytorch_tanh": True}

# how the names of tensors begin, see _newest_name
_TOWER = "model.vision_tower.vision_model."
_PROJECTOR = "model.multi_modal_projector."

_LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


@dataclass(frozen=True)
class Tower:
    """A vision tower's shape, from config.json with transformers' defaults filled in.

    Attributes:
        model_type: `clip_vision_model` or `siglip_vision_model`.
        n_layer: layers that run, the only ones written.
        image_size, patch_size: side of the square image and of a patch, in pixels.
        use_gelu, eps: of its layers.
        feature_layers: the hidden states that the projector reads, 0 = the input of the first layer.
        image_mean, image_std: of the pixels, per colour channel.
    """

    model_type: str
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    image_size: int
    patch_size: int
    use_gelu: bool
    eps: float
    feature_layers: tuple[int, ...]
    image_mean: list[float]
    image_std: list[float]

    @property
    def n_patches(self) -> int:
        """The tokens that one image becomes."""
        return (self.image_size // self.patch_size) ** 2


def convert_mmproj(hf_dir: Path, out: Path, *, outtype: str = "f16", force: bool = False) -> Tower:
    """Write the vision tower and projector of a LLaVA-1.5 or LLaVA-NeXT checkpoint as a GGUF for mtmd.

    Args:
        hf_dir: folder with `config.json`, `preprocessor_config.json` and `*.safetensors` (transformers
            layout; f32, f16 or bf16).
        out: the file to write.
        outtype: `f16` or `f32`, the type of the matrices; vectors and position embeddings are always f32.
        force: replace `out` if it exists.

    Raises:
        SparseMMError: the folder is not such a checkpoint, is incomplete, or uses something that mtmd's
            LLaVA graph cannot compute; or `out` exists.
    """
    if outtype not in OUTTYPES:
        raise SparseMMError(f"outtype {outtype!r} is not one of {', '.join(OUTTYPES)}")
    if out.exists() and not force:
        raise SparseMMError(f"{out} exists; use --force to replace it")

    config = _read_json(hf_dir, "config.json")
    _check_is_llava(hf_dir, config)
    tower = _read_tower(hf_dir, config)
    checkpoint = _Checkpoint(hf_dir)

    with atomic_path(out) as part, closing(gguf.GGUFWriter(part, "clip")) as writer:
        _add_metadata(writer, hf_dir, config, tower, outtype)
        for name, data in _mmproj_tensors(checkpoint, config, tower):
            writer.add_tensor(name, _as_outtype(name, data, outtype))
        writer.add_vision_projection_dim(checkpoint.find(_PROJECTOR + "linear_2.weight").shape[0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return tower


def _read_json(hf_dir: Path, name: str) -> dict[str, Any]:
    path = hf_dir / name
    if not path.is_file():
        raise SparseMMError(f"{hf_dir} has no {name}; expected the folder of a Hugging Face LLaVA checkpoint")
    value = read_json(path)
    if not isinstance(value, dict):
        raise SparseMMError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _check_is_llava(hf_dir: Path, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if "mm_vision_tower" in config:
        raise SparseMMError(
            f"{hf_dir} is a LLaVA checkpoint in its authors' own layout (mm_vision_tower); "
            "use the transformers layout of the same model (the llava-hf repositories)"
        )
    if model_type in ("llava", "llava_next"):
        return
    if "vision_config" in config:
        raise SparseMMError(
            f"{hf_dir / 'config.json'}: model_type is {model_type!r}, expected 'llava' or 'llava_next'; "
            "for other vision-language models use llama.cpp's convert_hf_to_gguf.py --mmproj"
        )
    raise SparseMMError(
        f"{hf_dir / 'config.json'}: model_type is {model_type!r} and there is no vision_config; "
        "expected a LLaVA-1.5 ('llava') or LLaVA-NeXT ('llava_next') checkpoint"
    )


def _read_tower(hf_dir: Path, config: dict[str, Any]) -> Tower:
    path = hf_dir / "config.json"
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        raise SparseMMError(f"{path}: vision_config is missing")
    model_type = vision.get("model_type", "clip_vision_model")
    if not isinstance(model_type, str) or model_type not in _TOWER_DEFAULTS:
        raise SparseMMError(
            f"{path}: the vision tower is {model_type!r}, supported are {', '.join(_TOWER_DEFAULTS)}; "
            "for Pixtral use llama.cpp's convert_hf_to_gguf.py --mmproj"
        )
    vision = _TOWER_DEFAULTS[model_type] | vision
    for key, default in _TOWER_DEFAULTS[model_type].items():
        value = vision[key]
        if isinstance(default, int) and not (type(value) is int and 1 <= value < 1e9):
            raise SparseMMError(f"{path}: {key} of the vision tower is {value!r}, expected a whole number")
        if isinstance(default, float) and not (_is_number(value) and value > 0):
            raise SparseMMError(f"{path}: {key} of the vision tower is {value!r}, expected a number")

    # SigLIP has no class token: dropping the first token, as "default" does, would drop a patch
    strategy = config.get("vision_feature_select_strategy", "default")
    expected = "default" if model_type == "clip_vision_model" else "full"
    if strategy != expected:
        raise SparseMMError(
            f"{path}: vision_feature_select_strategy is {strategy!r}, but llama.cpp reads a {model_type} "
            f"only as {expected!r} (all patches, no class token)"
        )
    if not isinstance(vision["hidden_act"], str) or vision["hidden_act"] not in _USE_GELU:
        raise SparseMMError(
            f"{path}: hidden_act of the vision tower is {vision['hidden_act']!r}, "
            f"supported are {', '.join(_USE_GELU)}"
        )
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise SparseMMError(
            f"{path}: projector_hidden_act is {config['projector_hidden_act']!r}, llama.cpp computes gelu"
        )
    if vision["hidden_size"] == vision["intermediate_size"]:
        raise SparseMMError(
            f"{path}: the tower's intermediate_size equals its hidden_size ({vision['hidden_size']}); "
            "llama.cpp tells the two feed-forward matrices apart by their shapes"
        )

    n_layer = vision["num_hidden_layers"]
    stated = config.get("vision_feature_layer", -2)
    stated = stated if isinstance(stated, list) else [stated]
    if not all(type(layer) is int for layer in stated):
        raise SparseMMError(f"{path}: vision_feature_layer is {stated}, expected whole numbers")
    layers = tuple(layer if layer >= 0 else n_layer + 1 + layer for layer in stated)
    if not layers or min(layers) < 0 or not 1 <= max(layers) <= n_layer:
        raise SparseMMError(f"{path}: vision_feature_layer {stated} does not fit a tower of {n_layer} layers")
    if list(layers) != sorted(set(layers)):
        raise SparseMMError(
            f"{path}: vision_feature_layer {stated} is not in ascending order, as llama.cpp concatenates them"
        )
    mean, std = _read_image_statistics(hf_dir)
    return Tower(
        model_type=model_type,
        n_embd=vision["hidden_size"],
        n_ff=vision["intermediate_size"],
        n_layer=max(layers),
        n_head=vision["num_attention_heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        use_gelu=_USE_GELU[vision["hidden_act"]],
        eps=vision["layer_norm_eps"],
        feature_layers=layers,
        image_mean=mean,
        image_std=std,
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _read_image_statistics(hf_dir: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per colour channel, from whichever file this transformers wrote."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (hf_dir / name).is_file():
            value = _read_json(hf_dir, name)
            value = value.get("image_processor", value)
            both = [
                value.get(key) if isinstance(value, dict) else None for key in ("image_mean", "image_std")
            ]
            if all(isinstance(each, list) and len(each) == 3 and all(map(_is_number, each)) for each in both):
                mean, std = ([float(number) for number in each] for each in both if each)
                return mean, std
    raise SparseMMError(
        f"{hf_dir} has no preprocessor_config.json with image_mean and image_std of three channels; "
        "without them the tower would see wrong colours"
    )


class _Checkpoint:
    """The tensors of a folder of safetensors files, by _newest_name.

    Attributes:
        tensors: all of them.
    """

    def __init__(self, hf_dir: Path) -> None:
        self._dir = hf_dir
        self.tensors: dict[str, LocalTensor] = {}
        files = sorted(hf_dir.glob("*.safetensors"))
        if not files:
            raise SparseMMError(
                f"{hf_dir} has no *.safetensors; load the checkpoint with transformers and save it again "
                "with save_pretrained"
            )
        for file in files:
            try:
                found = SafetensorsLocal(file).tensors
            except (OSError, ValueError, KeyError) as error:
                raise SparseMMError(f"cannot read {file} as safetensors: {error}") from error
            self.tensors |= {_newest_name(name): tensor for name, tensor in found.items()}
        index = hf_dir / "model.safetensors.index.json"
        if index.is_file():
            wanted = set(_read_json(hf_dir, index.name).get("weight_map", {}).values())
            missing = sorted(wanted - {file.name for file in files})
            if missing:
                raise SparseMMError(f"{hf_dir} lacks {', '.join(missing)}, which {index.name} names")

    def find(self, name: str) -> LocalTensor:
        if name not in self.tensors:
            raise SparseMMError(f"{self._dir}: tensor {name} is missing from the safetensors files")
        return self.tensors[name]

    def read(self, prefix: str, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """One tensor as float32 or float16 of `shape`; bf16 becomes float32."""
        tensor = self.find(prefix + name)
        if shape is not None and tensor.shape != shape:
            raise SparseMMError(
                f"{tensor.data_range.filename}: {name} has shape {tensor.shape}, config.json implies {shape}"
            )
        try:
            raw = tensor.mmap_bytes()
        except (OSError, ValueError) as error:
            raise SparseMMError(f"{tensor.data_range.filename} is cut short at tensor {name}") from error
        if tensor.dtype == "BF16":
            data = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif tensor.dtype in ("F16", "F32"):
            data = raw.view(np.float16 if tensor.dtype == "F16" else np.float32)
        else:
            raise SparseMMError(
                f"{tensor.data_range.filename}: {name} is {tensor.dtype}, expected F32, F16 or BF16"
            )
        return data.reshape(tensor.shape)


def _newest_name(name: str) -> str:
    """A name as the newest transformers writes it: with `model.`, and of towers with `vision_model.` too."""
    name = re.sub(r"^(language_model\.)?model\.", "", name)
    return "model." + re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def _mmproj_tensors(
    checkpoint: _Checkpoint, config: dict[str, Any], tower: Tower
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name in mmproj.gguf, data) of all that runs; shapes are checked against config.json."""
    n_embd, n_ff, patch = tower.n_embd, tower.n_ff, tower.patch_size
    is_clip = tower.model_type == "clip_vision_model"

    def read(name: str, *shape: int) -> np.ndarray:
        return checkpoint.read(_TOWER, name, shape)

    yield "v.patch_embd.weight", read("embeddings.patch_embedding.weight", n_embd, 3, patch, patch)
    if is_clip:
        yield "v.class_embd", read("embeddings.class_embedding", n_embd)
    else:
        yield "v.patch_embd.bias", read("embeddings.patch_embedding.bias", n_embd)
    n_positions = tower.n_patches + is_clip
    yield "v.position_embd.weight", read("embeddings.position_embedding.weight", n_positions, n_embd)
    if is_clip:  # the name is misspelt in its checkpoints
        yield "v.pre_ln.weight", read("pre_layrnorm.weight", n_embd)
        yield "v.pre_ln.bias", read("pre_layrnorm.bias", n_embd)

    for il in range(tower.n_layer):
        for theirs, ours in _LAYER_TENSORS.items():
            rows = n_ff if ours == "ffn_up" else n_embd
            columns = n_ff if ours == "ffn_down" else n_embd
            shape = (rows,) if ours.startswith("ln") else (rows, columns)
            yield f"v.blk.{il}.{ours}.weight", read(f"encoder.layers.{il}.{theirs}.weight", *shape)
            yield f"v.blk.{il}.{ours}.bias", read(f"encoder.layers.{il}.{theirs}.bias", rows)

    n_in = n_embd * len(tower.feature_layers)
    n_out = {
        name: checkpoint.find(f"{_PROJECTOR}{name}.weight").shape[0] for name in ("linear_1", "linear_2")
    }
    yield "mm.0.weight", checkpoint.read(_PROJECTOR, "linear_1.weight", (n_out["linear_1"], n_in))
    yield "mm.2.weight", checkpoint.read(_PROJECTOR, "linear_2.weight")
    for ours, theirs in (("mm.0.bias", "linear_1"), ("mm.2.bias", "linear_2")):
        if f"{_PROJECTOR}{theirs}.bias" in checkpoint.tensors:
            yield ours, checkpoint.read(_PROJECTOR, f"{theirs}.bias")
        else:  # multimodal_projector_bias is false, but mtmd adds a bias always
            yield ours, np.zeros(n_out[theirs], np.float32)

    if config["model_type"] == "llava_next":
        yield "v.image_newline", checkpoint.read("model.", "image_newline")


def _as_outtype(name: str, data: np.ndarray, outtype: str) -> np.ndarray:
    if outtype == "f32" or data.ndim < 2 or name == "v.position_embd.weight":
        return data.astype(np.float32)
    if data.dtype != np.float16 and np.abs(data).max() > np.finfo(np.float16).max:
        raise SparseMMError(f"{name} holds values that f16 cannot; use --outtype f32")
    return data.astype(np.float16)


def _add_metadata(
    writer: gguf.GGUFWriter, hf_dir: Path, config: dict[str, Any], tower: Tower, outtype: str
) -> None:
    writer.add_type("mmproj")
    writer.add_name(hf_dir.resolve().name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if outtype == "f16" else gguf.LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.n_embd)
    writer.add_vision_feed_forward_length(tower.n_ff)
    writer.add_vision_block_count(tower.n_layer)
    writer.add_vision_head_count(tower.n_head)
    writer.add_vision_attention_layernorm_eps(tower.eps)
    writer.add_vision_image_mean(tower.image_mean)
    writer.add_vision_image_std(tower.image_std)
    writer.add_vision_use_gelu(tower.use_gelu)
    writer.add_array("clip.vision.feature_layer", list(tower.feature_layers))
    if config["model_type"] == "llava_next":
        pinpoints = config.get("image_grid_pinpoints", _NEXT_PINPOINTS)
        if not isinstance(pinpoints, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in pinpoints
        ):
            raise SparseMMError(
                f"{hf_dir / 'config.json'}: image_grid_pinpoints is no list of pairs of numbers"
            )
        # transformers writes (height, width), clip.cpp reads (width, height)
        writer.add_array(
            "clip.vision.image_grid_pinpoints",
            [int(side) for height, width in pinpoints for side in (width, height)],
        )
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
