"""Pictures: what a person sees who opens the file is what every command and the API read, or one line."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from helpers.command_line import CommandLine
from sparsemm_edge import SparseMMError
from sparsemm_edge.demo import DemoModel
from sparsemm_edge.pages.grid import grid_page
from sparsemm_edge.pictures import open_picture

Make = Callable[[Image.Image], Image.Image]


@pytest.fixture(scope="module")
def page() -> Image.Image:
    """A page of black text on white, with a mark at the top left that tells up from down."""
    image = grid_page(3).image.convert("L")
    image.paste(0, (0, 0, 40, 12))
    return image.convert("RGB")


def ink(page: Image.Image) -> Image.Image:
    """How black each pixel is, as the alpha of black on a transparent ground."""
    return page.convert("L").point(lambda value: 255 - value)


def black_on_nothing(page: Image.Image) -> Image.Image:
    picture = Image.new("RGBA", page.size, (0, 0, 0, 0))
    picture.putalpha(ink(page))
    return picture


def one_bit(page: Image.Image) -> Image.Image:
    return page.convert("L").point(lambda value: 255 * (value > 127)).convert("1")


def transparent_palette(page: Image.Image) -> Image.Image:
    picture = one_bit(page).convert("P", palette=Image.Palette.WEB)
    white = picture.getpixel((page.width - 1, page.height - 1))
    picture.putpalette([0, 0, 0] * 256)
    picture.info["transparency"] = white
    return picture


def grey(page: Image.Image, dtype: Any, white: float, black: float = 0) -> Image.Image:
    values = np.asarray(page.convert("L")) / 255
    return Image.fromarray((black + values * (white - black)).astype(dtype))


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def turned(page: Image.Image, orientation: int) -> bytes:
    """A file whose EXIF data says how to turn the page that lies in it."""
    turns = {
        1: [],
        3: [Image.Transpose.ROTATE_180],
        6: [Image.Transpose.ROTATE_90],
        8: [Image.Transpose.ROTATE_270],
        5: [Image.Transpose.TRANSPOSE],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
    }
    for turn in turns[orientation]:
        page = page.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(page, "PNG", exif=exif)


FORMS: dict[str, Callable[[Image.Image], bytes]] = {
    "png": lambda page: saved(page, "PNG"),
    "transparent png": lambda page: saved(black_on_nothing(page), "PNG"),
    "transparent webp": lambda page: saved(black_on_nothing(page), "WEBP", lossless=True, exact=True),
    "grey with alpha": lambda page: saved(black_on_nothing(page).convert("LA"), "PNG"),
    "palette": lambda page: saved(page.quantize(256), "PNG"),
    "grey": lambda page: saved(page.convert("L"), "PNG"),
    "16 bits": lambda page: saved(grey(page, np.uint16, 65535), "PNG"),
    "12 bits of 16": lambda page: saved(grey(page, np.uint16, 4095), "PNG"),
    "8 bits of 16": lambda page: saved(grey(page, np.uint16, 255), "TIFF"),
    "16 bits, big-endian": lambda page: saved(grey(page, ">u2", 65535), "TIFF"),
    "32 bits": lambda page: saved(grey(page, np.int32, 65535), "TIFF"),
    "float to 1": lambda page: saved(grey(page, np.float32, 1), "TIFF"),
    "float to 255": lambda page: saved(grey(page, np.float32, 255), "TIFF"),
    "float from -1": lambda page: saved(grey(page, np.float32, 1, black=-1), "TIFF"),
    "turned 3": lambda page: turned(page, 3),
    "turned 5": lambda page: turned(page, 5),
    "turned 6": lambda page: turned(page, 6),
    "turned 8": lambda page: turned(page, 8),
    "mirrored": lambda page: turned(page, 2),
    "cmyk": lambda page: saved(page.convert("CMYK"), "TIFF"),
    "cmyk jpeg": lambda page: saved(page.convert("CMYK"), "JPEG", quality=100, subsampling=0),
    "pages": lambda page: saved(
        page, "TIFF", save_all=True, append_images=[Image.new("RGB", page.size, "red")]
    ),
    "animation": lambda page: saved(
        page, "WEBP", save_all=True, append_images=[Image.new("RGB", page.size, "red")], lossless=True
    ),
}
BLACK_AND_WHITE: dict[str, Callable[[Image.Image], bytes]] = {
    "1 bit": lambda page: saved(one_bit(page), "PNG"),
    "transparent gif": lambda page: saved(transparent_palette(page), "GIF"),
    "transparent palette": lambda page: saved(transparent_palette(page), "PNG"),
}


def alike(picture: Image.Image, page: Image.Image) -> bool:
    if (picture.mode, picture.size) != ("RGB", page.size):
        return False
    differs = np.abs(np.asarray(picture).astype(int) - np.asarray(page).astype(int))
    return bool(differs.mean() < 2 and np.quantile(differs, 0.99) <= 16)


@pytest.mark.parametrize("name", FORMS)
def test_a_picture_is_what_a_person_sees(name: str, page: Image.Image, tmp_path: Path) -> None:
    data = FORMS[name](page)
    (tmp_path / "page").write_bytes(data)
    assert alike(open_picture(tmp_path / "page"), page)
    assert alike(open_picture(str(tmp_path / "page")), page)
    assert alike(open_picture(data), page)
    with Image.open(io.BytesIO(data)) as opened:  # as the API is handed it
        assert alike(open_picture(opened), page)


@pytest.mark.parametrize("name", BLACK_AND_WHITE)
def test_black_on_nothing_is_black_on_white(name: str, page: Image.Image) -> None:
    assert alike(open_picture(BLACK_AND_WHITE[name](page)), one_bit(page).convert("RGB"))


def test_a_constant_picture_of_any_kind_stays_one() -> None:
    for mode in ("1", "L", "I", "F", "I;16", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV"):
        assert open_picture(Image.new(mode, (3, 2))).size == (3, 2)
    values = np.array([[np.nan, np.inf, -np.inf, 0.0, 1.0]], dtype=np.float32)
    assert np.asarray(open_picture(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 0, 0, 255]


# --- every place where pictures come in


@pytest.mark.parametrize("name", ["transparent png", "16 bits", "turned 6"])
def test_every_command_and_the_api_read_the_same(
    name: str, page: Image.Image, tmp_path: Path, sparsemm: CommandLine
) -> None:
    from sparsemm_edge.evaluation import datasets
    from sparsemm_edge.pages.readers import open_pages
    from sparsemm_edge.runtime import VisionModel, generate
    from sparsemm_edge.runtime.prompt import read_image

    data = FORMS[name](page)
    file = tmp_path / "page.png"
    file.write_bytes(data)
    # the runtime, of which generate, chat, profile and the API are made
    with Image.open(io.BytesIO(data)) as opened:
        assert alike(Image.fromarray(read_image(opened)), page)
    assert alike(Image.fromarray(read_image(file)), page)
    # eval, from a file and from parquet
    record = {"image": "page.png", "question": "?", "answers": ["x"], "metric": "anls"}
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    row = {"query": "?", "label": ["x"], "image": {"bytes": data}}
    write_parquet(tmp_path / "parquet" / "q.parquet", row)
    for source in (tmp_path / "q.jsonl", tmp_path / "parquet"):
        image = datasets.load(str(source)).questions[0].open_image()
        assert alike(Image.fromarray(read_image(image)), page)
    # score, from both
    chunk = {"text": "x", "box": [0, 0, 1, 1]}
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "page.png").write_bytes(data)
    (tmp_path / "score" / "p.jsonl").write_text(json.dumps({"image": "page.png", "chunks": [chunk]}))
    write_parquet(tmp_path / "packed" / "p.parquet", {"image": {"bytes": data}, "chunks": [chunk]})
    for folder in ("score", "packed"):
        assert alike(open_pages(str(tmp_path / folder), 1).page(0).image, page)
    # and what the model says of it
    files = DemoModel()
    arguments = ("generate", "-m", files.model, "--mmproj", files.mmproj, "-p", "Read it.", "--threads", 1)
    page.save(tmp_path / "plain.png")
    texts = [
        sparsemm(*arguments, "-n", 24, "--json", "--image", image).report["text"]
        for image in (tmp_path / "plain.png", file)
    ]
    with VisionModel.load(files.model, files.mmproj, n_threads=1) as model, Image.open(file) as opened:
        texts.append("".join(generate(model, "Read it.", [opened], n_predict=24)))
    assert texts[0] == texts[1] == texts[2] != ""


def write_parquet(path: Path, row: dict[str, Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)


# --- what is refused


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge() -> bytes:
    head = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def broken_exif() -> bytes:
    """EXIF data whose type of the orientation is no number, so that it cannot be taken out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9003] = "2024:01:01 00:00:00"
    for place in range(6, len(exif.tobytes())):
        for value in (0, 1, 3, 5, 12, 255):
            data = bytearray(exif.tobytes())
            data[place] = value
            picture = saved(Image.new("RGB", (8, 6)), "JPEG", exif=bytes(data))
            try:
                open_picture(picture)
            except SparseMMError:
                return picture
    raise AssertionError("Pillow takes whatever is done to it")


REFUSED = {
    "heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC"),
    "heif": (lambda: b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(64), "HEIC"),
    "pdf": (lambda: b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n", "PDF"),
    "svg": (lambda: b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "huge": (huge, "178,956,970 pixels"),
    "exif": (broken_exif, "EXIF data is broken"),
    "text": (lambda: b"A text about a picture.", "not an image"),
    "empty": (lambda: b"", "not an image"),
    "cut short": (lambda: saved(Image.effect_noise((99, 99), 50), "PNG")[:2000], "not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_named_in_one_line(
    name: str, tmp_path: Path, sparsemm: CommandLine, recwarn: pytest.WarningsRecorder
) -> None:
    make, said = REFUSED[name]
    file = tmp_path / "page.png"
    file.write_bytes(make())
    for source, where in ((file, str(file)), (file.read_bytes(), "page 7")):
        with pytest.raises(SparseMMError, match=said) as caught:
            open_picture(source, "" if source is file else where)
        assert str(caught.value).startswith(where) and "\n" not in str(caught.value)
    files = DemoModel()
    refusal = sparsemm(
        "generate", "-m", files.model, "--mmproj", files.mmproj, "--image", file, "-p", "?"
    ).refusal
    assert said in refusal and str(file) in refusal
    assert not recwarn.list


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for source, said in (
        (tmp_path / "nowhere.png", "nowhere.png: no such file"),
        (tmp_path, "a folder, not a picture"),
        ("a\0b.png", "not an image that can be read"),
    ):
        with pytest.raises(SparseMMError, match=said):
            open_picture(source)
    with pytest.raises(SparseMMError, match="the picture: a picture without pixels"):
        open_picture(Image.new("RGB", (0, 5)))


def test_odd_but_harmless_data_is_no_reason_to_refuse(recwarn: pytest.WarningsRecorder) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", "x" * 10_000)
    picture = Image.new("P", (4, 4))
    assert open_picture(saved(picture, "PNG", pnginfo=about, transparency=bytes(range(8)))).size == (4, 4)
    assert not recwarn.list


def test_fidelity_only_names_what_it_skips(tmp_path: Path, page: Image.Image, sparsemm: CommandLine) -> None:
    page.save(tmp_path / "a.png")
    for name in ("b.heic", "c.pdf", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more").mkdir()
    files = DemoModel()
    arguments = ("eval", "-m", files.model, "--mmproj", files.mmproj, "--scores", files.scores)
    done = sparsemm(
        *arguments, "--fidelity-only", tmp_path, "--policies", "full", "-n", 1, "--threads", 1,
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.status == 0
    assert f"note: {tmp_path}: skipped, as they are no image files: b.heic, c.pdf, more/" in done.err


@pytest.mark.parametrize("prompt", ["", " "])
def test_an_image_without_text_is_a_question(
    prompt: str, page: Image.Image, tmp_path: Path, sparsemm: CommandLine
) -> None:
    files = DemoModel()
    page.save(tmp_path / "page.png")
    asked = ("-m", files.model, "--mmproj", files.mmproj, "--image", tmp_path / "page.png", "--threads", 1)
    asked = (*asked, "-p", prompt, "--scores", files.scores)
    evicted = ("--budget", 64, "--window", 8)
    assert sparsemm("generate", *asked, *evicted, "-n", 2, "--json").report["n_prompt"] > 576
    assert sparsemm("kept", *asked, *evicted, "--out", tmp_path / "kept.png").status == 0
    if not prompt:
        done = sparsemm("profile", *asked, "--budgets", 64, "-n", 1, "--out", tmp_path / "p", "--json")
        assert {setting["status"] for setting in done.report["settings"]} == {"ok"}
