"""Load a Hugging Face vision-language model, and make its prompt: a question about one page.

Tokenizer, image processor and chat template are loaded one by one, since transformers builds some processors
only with torchvision, for videos.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import select_best_resolution
from transformers.utils import cached_file, logging

from sparsemm_edge.errors import SparseMMError, check_within, one_line
from sparsemm_edge.files import read_bytes, read_json, read_text
from sparsemm_edge.scoring import geometry
from sparsemm_edge.scoring.geometry import ImageLayout
from sparsemm_edge.scoring.strongest import strongest_positions, table
from sparsemm_edge.scoring.target_response import Answer

_MOST_LAYERS = 1000
_IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
DTYPES = {"auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ScoringPrompt:
    """The prompt of a question about one page.

    Attributes:
        inputs: arguments of the model's `generate`, on its device.
        n_tokens: length of the prompt.
        image_positions: int64 [n_image_tokens], where in the prompt the image tokens are.
        layout: the part of the page that each of them shows.
    """

    inputs: dict[str, torch.Tensor]
    n_tokens: int
    image_positions: npt.NDArray[np.int64]
    layout: ImageLayout


View = tuple[str, ImageLayout, Any]
"""An image as processed for one architecture: what replaces the image token in the prompt, the layout of the
image tokens in that text, and what the image processor returned."""


class VisionLanguageModel:
    """A Reader on transformers: a loaded checkpoint.

    Attributes:
        name: the checkpoint's folder or hub id.
        model, decoder: the whole model, and its text model.
        config: of the whole model.
        n_layer, n_head, n_head_kv: of the text model.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, image_processor: Any, chat_template: str | None = None
    ) -> None:
        self.name = name
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self.decoder = model.get_decoder()
        text_config = self.decoder.config
        self.n_layer: int = text_config.num_hidden_layers
        self.n_head: int = text_config.num_attention_heads
        self.n_head_kv: int = getattr(text_config, "num_key_value_heads", None) or self.n_head
        self.config = model.config
        self.image_token_id: int = self.config.image_token_id
        self.image_token: str = tokenizer.convert_ids_to_tokens(self.image_token_id)
        if (
            self.image_token is None
            or tokenizer.convert_tokens_to_ids(self.image_token) != self.image_token_id
        ):
            raise SparseMMError(f"{name}: its tokenizer has no image token (id {self.image_token_id})")

    @property
    def attentions(self) -> list[Any]:
        """The self-attention module of each layer of the text model."""
        return [layer.self_attn for layer in self.decoder.layers]

    def question(self, text: str) -> str:
        """The full prompt: from the chat template, or the question itself if it has the image token."""
        if self.image_token in text:
            return text
        if not self.chat_template:
            raise SparseMMError(
                f"{self.name} has no chat template: give the whole prompt, with {self.image_token} in it"
            )
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        for content in (parts, f"{self.image_token}\n{text}"):
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
            if prompt.count(self.image_token) == 1 and text in prompt:
                return prompt
        raise SparseMMError(
            f"{self.name}: its chat template does not place one image: give the whole prompt,"
            f" with {self.image_token} in it"
        )

    def prompt(self, question: str, page: Image.Image) -> ScoringPrompt:
        """The prompt for a question about a page.

        Raises:
            SparseMMError: prompt or processor do not fit the model.
        """
        with _failures(self.name, "make a prompt of a page"):
            text = self.question(question)
            if text.count(self.image_token) != 1:
                raise SparseMMError(
                    f"the prompt must hold {self.image_token} once, not {text.count(self.image_token)}"
                )
            of_image, layout, batch = ARCHITECTURES[self.config.model_type](self, page.convert("RGB"))
            text = text.replace(self.image_token, of_image)
            bos = self.tokenizer.bos_token
            has_bos = bool(bos) and text.startswith(bos)
            ids = self.tokenizer(text, add_special_tokens=not has_bos, return_tensors="pt")["input_ids"]
            is_image = ids[0] == self.image_token_id
            if int(is_image.sum()) != len(layout):
                raise SparseMMError(
                    f"{self.name}: {int(is_image.sum())} image tokens in the prompt, {len(layout)} expected"
                )
            inputs = {key: value for key, value in batch.items() if key in _IMAGE_INPUTS}
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
                inputs["mm_token_type_ids"] = is_image[None].int()
            return ScoringPrompt(
                dict(BatchFeature(inputs).to(self.model.device, self.model.dtype)),
                n_tokens=ids.shape[1],
                image_positions=torch.nonzero(is_image)[:, 0].numpy(),
                layout=layout,
            )

    @torch.inference_mode()
    def answer(self, prompt: ScoringPrompt, max_new_tokens: int) -> list[int]:
        """The greedy answer's tokens, the end token included.

        Raises:
            SparseMMError: the model cannot answer, for example out of memory.
        """
        own = self.model.generation_config
        with _failures(self.name, "answer"):
            done = self.model.generate(
                **prompt.inputs,
                # what else a checkpoint states (sampling, penalties) would not be greedy
                generation_config=type(own)(
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    bos_token_id=own.bos_token_id,
                    eos_token_id=own.eos_token_id,
                    pad_token_id=0,  # for shorter answers of a batch, and this is a batch of one
                ),
            )
        return list(done[0, prompt.n_tokens :].tolist())

    def read(self, question: str, page: Image.Image, max_new_tokens: int) -> Answer:
        """The greedy answer to a question about a page, and the strongest positions of each head.

        Raises:
            SparseMMError: prompt or processor do not fit the model, or it cannot answer.
        """
        prompt = self.prompt(question, page)
        with strongest_positions(self.decoder, self.attentions, prompt.n_tokens) as found:
            tokens = self.answer(prompt, max_new_tokens)
            return Answer(tokens, table(found), prompt.image_positions, prompt.layout)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def n_text_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _has_class_token(model: VisionLanguageModel) -> bool:
    tower = model.config.vision_config.model_type
    known = {"clip_vision_model": True, "siglip_vision_model": False}
    if tower not in known:
        raise SparseMMError(
            f"{model.name}: image encoder {tower!r} is not supported; expected {' or '.join(sorted(known))}"
        )
    return known[tower]


def _view_llava(model: VisionLanguageModel, page: Image.Image) -> View:
    processor = model.image_processor
    batch = processor([page], return_tensors="pt")
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    layout = geometry.cropped_square(
        page.size[::-1],
        tuple(batch["pixel_values"].shape[-2:]),
        patch=model.config.vision_config.patch_size,
        resize=size if processor.do_resize else None,
        pad_to_square=bool(processor.do_pad) if hasattr(processor, "pad_to_square") else False,
        n_class_tokens=int(_has_class_token(model)),
        n_dropped=int(model.config.vision_feature_select_strategy == "default"),
    )
    return model.image_token * len(layout), layout, batch


def _view_anyres(model: VisionLanguageModel, page: Image.Image) -> View:
    config = model.config
    batch = model.image_processor([page], return_tensors="pt")
    height, width = batch["image_sizes"][0].tolist()
    canvas = select_best_resolution((height, width), config.image_grid_pinpoints)
    tile, patch = batch["pixel_values"].shape[-1], model.config.vision_config.patch_size
    n_tiles = batch["pixel_values"].shape[1] - 1
    if n_tiles != (canvas[0] // tile) * (canvas[1] // tile):
        raise SparseMMError(
            f"{model.name}: its image processor makes {n_tiles} tiles of {tile} pixels of a page of {width} x"
            f" {height}, which is not the {canvas[1]} x {canvas[0]} that the model's config chooses"
        )
    if (config.vision_feature_select_strategy == "default") != _has_class_token(model):
        raise SparseMMError(
            f"{model.name}: vision_feature_select_strategy {config.vision_feature_select_strategy!r} does not"
            f" go with an image encoder of type {model.config.vision_config.model_type!r}"
        )
    ratio = getattr(config, "vision_aspect_ratio", None)  # "anyres_max_9": LLaVA-OneVision
    layout = geometry.padded_tiles(
        (height, width),
        canvas,
        tile=tile,
        patch=patch,
        max_tiles=None if ratio is None else int(ratio.removeprefix("anyres_max_")),
    )
    return model.image_token * len(layout), layout, batch


def _view_qwen(model: VisionLanguageModel, page: Image.Image) -> View:
    batch = model.image_processor([page], return_tensors="pt")
    _, n_rows, n_columns = batch["image_grid_thw"][0].tolist()
    merge = model.config.vision_config.spatial_merge_size
    layout = geometry.join((geometry.split(page.size[::-1], n_rows // merge, n_columns // merge), True))
    return model.image_token * len(layout), layout, batch


def _view_internvl(model: VisionLanguageModel, page: Image.Image) -> View:
    batch = model.image_processor([page], return_tensors="pt", crop_to_patches=True)
    pixels = batch["pixel_values"]
    patch = model.config.vision_config.patch_size
    patch_height = patch if isinstance(patch, int) else patch[0]
    side = round(pixels.shape[-2] // patch_height * model.config.downsample_ratio)
    n_tiles = len(pixels) - 1 if len(pixels) > 1 else 1
    layout = geometry.stretched_tiles(page.size[::-1], geometry.tiling(page.size[::-1], n_tiles), side)
    start = getattr(model.tokenizer, "start_image_token", None) or "<img>"
    end = getattr(model.tokenizer, "end_image_token", None) or "</img>"
    return f"{start}{model.image_token * len(layout)}{end}", layout, batch


def _view_idefics3(model: VisionLanguageModel, page: Image.Image) -> View:
    batch = model.image_processor([page], return_tensors="pt", return_row_col_info=True)
    n_rows, n_columns = (max(1, int(np.asarray(batch[key]).ravel()[0])) for key in ("rows", "cols"))
    config = model.config
    side = batch["pixel_values"].shape[-1] // config.vision_config.patch_size // config.scale_factor
    layout = geometry.stretched_tiles(page.size[::-1], (n_rows, n_columns), side)
    around = getattr(model.tokenizer, "fake_image_token", None) or "<fake_token_around_image>"
    whole = getattr(model.tokenizer, "global_image_token", None) or "<global-img>"
    tokens = model.image_token * side**2
    text = f"{around}{whole}{tokens}{around}"
    if n_rows * n_columns > 1:
        rows = (
            "".join(f"{around}<row_{row + 1}_col_{column + 1}>{tokens}" for column in range(n_columns))
            for row in range(n_rows)
        )
        text = "\n".join(rows) + "\n\n" + text
    return text, layout, batch


ARCHITECTURES: dict[str, Callable[[VisionLanguageModel, Image.Image], View]] = {
    "llava": _view_llava,
    "llava_next": _view_anyres,
    "llava_onevision": _view_anyres,
    "qwen2_vl": _view_qwen,
    "qwen2_5_vl": _view_qwen,
    "qwen3_vl": _view_qwen,
    "internvl": _view_internvl,
    "idefics3": _view_idefics3,
    "smolvlm": _view_idefics3,
}
"""What can be scored, by the checkpoint's `model_type`."""


def load(name: str, *, device: str | None = None, dtype: str = "auto") -> VisionLanguageModel:
    """Load a checkpoint.

    Args:
        name: a folder, read without the network, or a hub id, downloaded if needed.
        device: a torch device; "auto" splits the model over all devices (needs accelerate); None: the GPU if
            there is one, or the CPU.
        dtype: one of DTYPES; "auto" is the checkpoint's own.

    Raises:
        SparseMMError: no such checkpoint, one that cannot be scored, or files of it are missing.
    """
    local = _is_local(name)
    if dtype not in DTYPES:
        raise SparseMMError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    device = _checked_device(device)
    logging.disable_progress_bar()
    with _readable(name) if local else nullcontext(name) as source:
        with _failures(name, "load config.json"):
            config = AutoConfig.from_pretrained(source, local_files_only=local)
            check_architecture(name, config)
        with _failures(name, "load the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        with _failures(name, "load the image processor (preprocessor_config.json or processor_config.json)"):
            image_processor = AutoImageProcessor.from_pretrained(source, local_files_only=local)
        with _failures(name, "load the weights"):
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                source,
                config=config,
                dtype=DTYPES[dtype],
                attn_implementation="sdpa",
                device_map="auto" if device == "auto" else None,
                output_loading_info=True,
                local_files_only=local,
            )
            model, about = loaded
            _check_all_there(name, model, about["missing_keys"])
            if device != "auto":
                model.to(device)
        template = _chat_template(source, local)
    with _failures(name, "use what it holds"):
        return VisionLanguageModel(name, model, tokenizer, image_processor, template)


@contextmanager
def _readable(name: str) -> Iterator[str]:
    """A folder that transformers can read: the checkpoint's, or one with links to it.

    transformers expects UTF-8. Text files in UTF-16 or with a byte order mark are converted there.
    """
    folder = Path(name).expanduser().resolve()
    anew = {}
    for path in sorted(folder.iterdir()):
        is_text = path.suffix in (".json", ".jinja", ".txt") and path.is_file()
        if is_text and json.detect_encoding(read_bytes(path)[:4]) != "utf-8":
            anew[path.name] = read_text(path)
    if not anew:
        yield str(folder)
        return
    with TemporaryDirectory(prefix="sparsemm-edge-") as links:
        for path in folder.iterdir():
            target = Path(links) / path.name
            if path.name in anew:
                target.write_text(anew[path.name], encoding="utf-8", newline="")
            else:
                target.symlink_to(path)
        try:
            yield links
        except SparseMMError as error:
            raise SparseMMError(str(error).replace(links, name)) from error


def _check_all_there(name: str, model: Any, missing: Iterable[str]) -> None:
    """Raise SparseMMError if text-model weights are missing: transformers would use random ones."""
    decoder = model.get_decoder()
    where = next(prefix for prefix, module in model.named_modules() if module is decoder)
    lost = sorted(key for key in missing if key.startswith(f"{where}."))
    if lost:
        raise SparseMMError(f"{name}: {len(lost)} tensors of the text model are missing, such as {lost[0]}")


def check_architecture(name: str, config: Any) -> None:
    """Raise SparseMMError unless a checkpoint with this config can be scored."""
    if config.model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        if getattr(config, "vision_config", None) is None:
            raise SparseMMError(
                f"{name} reads no images (model type {config.model_type!r}): scored can be {supported}"
            )
        raise SparseMMError(
            f"{name}: model type {config.model_type!r} cannot be scored yet; scored can be {supported}"
        )
    # transformers would make layers until no memory is left
    for part in (config.text_config, config.vision_config):
        n_layer = getattr(part, "num_hidden_layers", getattr(part, "depth", 1))
        check_within(f"{name}: in config.json, layers of {part.model_type}", n_layer, 1, _MOST_LAYERS)


def _is_local(name: str) -> bool:
    """True for a folder, False for a hub id; SparseMMError for anything else."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SparseMMError(f"{name} is no Hugging Face checkpoint: it holds no config.json")
        return True
    if path.is_file():
        raise SparseMMError(f"{name} is a file: scoring takes the folder of a Hugging Face checkpoint")
    if name.count("/") > 1 or name.startswith(("/", "./", "../", "~")) or name.endswith("/") or "\\" in name:
        raise SparseMMError(f"there is no folder {name}")
    return False


def _checked_device(device: str | None) -> str:
    """A usable device, or "auto" with accelerate installed; SparseMMError otherwise."""
    if device == "auto":
        try:
            import accelerate  # noqa: F401
        except ImportError as error:
            raise SparseMMError(
                "--device auto needs accelerate, which is not installed: pip install accelerate"
            ) from error
        return device
    if device is None:
        gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        device = next((gpu for gpu, found in gpus.items() if found), "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SparseMMError(f"device {device!r} cannot be used: {one_line(error)}") from error
    return device


def _chat_template(name: str, local: bool) -> str | None:
    """The processor's chat template, if the checkpoint has one beside the tokenizer's."""
    for file in ("chat_template.jinja", "chat_template.json"):
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            local_files_only=local,
        )
        if path is not None:
            with _failures(name, f"load {file}"):
                found = Path(path)
                return read_text(found) if found.suffix == ".jinja" else read_json(found)["chat_template"]
    return None


@contextmanager
def _failures(name: str, what: str) -> Iterator[None]:
    """Turn any exception into a one-line error. Damaged checkpoints fail anywhere in transformers, sometimes
    with a plain Exception.
    """
    try:
        yield
    except SparseMMError:
        raise
    except Exception as error:
        first = str(error).split("\n\n")[0]
        raise SparseMMError(f"{name}: cannot {what}: {one_line(first or error)}") from error
