"""Pages to score on: what is made stands where its boxes say; users' pages are read, or refused in a line."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsemm_edge import SparseMMError
from sparsemm_edge.pages import Page
from sparsemm_edge.pages.documents import document_page
from sparsemm_edge.pages.readers import open_pages, page_size

SIZE = (448, 336)


@pytest.fixture(scope="module")
def pages() -> list[Page]:
    return [document_page(seed, SIZE) for seed in range(12)]


def test_a_seed_makes_the_same_page_again(pages: list[Page]) -> None:
    again = document_page(3, SIZE)
    assert again.chunks == pages[3].chunks
    assert np.array_equal(np.asarray(again.image), np.asarray(pages[3].image))
    assert document_page(4, SIZE).chunks != again.chunks


def test_every_chunk_is_ink_within_its_box(pages: list[Page]) -> None:
    for page in pages:
        assert page.image.size == SIZE
        grey = np.asarray(page.image.convert("L"), np.float32)
        assert len(page.chunks) >= 3
        for chunk in page.chunks:
            left, top, right, bottom = (round(edge) for edge in chunk.box)
            assert 0 <= left < right <= SIZE[0]
            assert 0 <= top < bottom <= SIZE[1]
            inside = grey[top:bottom, left:right]
            assert np.ptp(inside) > 50, chunk
            # the box is tight: its outermost rows and columns are reached by the ink, what lies around is not
            around = grey[max(top - 2, 0) : bottom + 2, max(left - 1, 0) : right + 1]
            assert inside.std() > 0.8 * around.std(), chunk


def test_no_text_stands_on_a_page_twice_and_no_box_on_another(pages: list[Page]) -> None:
    for page in pages:
        texts = [chunk.text for chunk in page.chunks]
        assert len(set(texts)) == len(texts)
        boxes = np.array([chunk.box for chunk in page.chunks])
        wide = np.minimum(boxes[:, None, 2], boxes[:, 2]) - np.maximum(boxes[:, None, 0], boxes[:, 0])
        high = np.minimum(boxes[:, None, 3], boxes[:, 3]) - np.maximum(boxes[:, None, 1], boxes[:, 1])
        overlaps = (wide > 0) & (high > 0)
        assert overlaps.sum() == len(boxes)  # each with itself


def test_pages_differ_in_what_they_say_and_how_they_look(pages: list[Page]) -> None:
    texts = {chunk.text for page in pages for chunk in page.chunks}
    assert any(text.isalpha() and text.islower() for text in texts)
    assert any(text.isdigit() for text in texts)
    assert any(text.isupper() for text in texts)
    papers = {tuple(np.asarray(page.image)[2, 2] // 16) for page in pages}
    heights = {round(page.chunks[-1].box[3] - page.chunks[-1].box[1]) for page in pages}
    assert len(papers) > 4
    assert len(heights) > 3


def test_seeds_give_pages_that_no_other_seed_gives() -> None:
    for data in ("documents", "grid", "grid-16"):
        names = [open_pages(data, 3, seed=seed, size=SIZE).page(i).name for seed in (0, 1) for i in range(3)]
        assert len(set(names)) == 6
    # evaluation reads the grid pages below 10,000, training those from a million on
    assert open_pages("grid", 1).page(0).name == "grid-10000"
    assert open_pages("grid-16", 1).page(0).image.size == (224, 224)


# --- users' pages -------------------------------------------------------------------------------------


def image_file(folder: Path, name: str = "a.png") -> bytes:
    Image.new("RGB", (40, 30), "white").save(folder / name)
    return (folder / name).read_bytes()


OWN = {
    "image": "a.png",
    "chunks": [{"text": "one", "box": [1, 2, 10, 12]}, {"text": "2", "box": [11, 2, 20, 12.5]}],
}
SYNTHDOG = {
    "image": "a.png",
    "2_coord": [
        {"chunk": "tilted", "coord": [[3, 2], [12, 4], [11.5, 9], [2.5, 8]]},
        {"chunk": " ", "coord": [[3, 2], [12, 2], [12, 8], [3, 8]]},
    ],
}


@pytest.mark.parametrize("name", ["pages.json", "pages.jsonl"])
def test_a_folder_of_images_with_chunks_and_boxes(tmp_path: Path, name: str) -> None:
    image_file(tmp_path)
    image_file(tmp_path, "b.png")
    records = [OWN, OWN | {"image": "b.png", "chunks": []}]
    text = json.dumps(records) if name == "pages.json" else "\n".join(map(json.dumps, records)) + "\n"
    (tmp_path / name).write_text(text)
    source = open_pages(str(tmp_path), 100)
    assert (source.n_pages, source.name) == (2, tmp_path.name)
    page = source.page(0)
    assert (page.name, page.image.size, page.image.mode) == ("a.png", (40, 30), "RGB")
    assert [(chunk.text, chunk.box) for chunk in page.chunks] == [
        ("one", (1, 2, 10, 12)),
        ("2", (11, 2, 20, 12.5)),
    ]
    assert source.page(1).chunks == ()
    assert open_pages(str(tmp_path), 1).n_pages == 1


def test_a_description_may_have_a_mark_and_line_ends_of_unicode(tmp_path: Path) -> None:
    image_file(tmp_path)
    record = OWN | {"chunks": [{"text": "a\u2028b", "box": [1, 2, 10, 12]}]}
    text = json.dumps(record, ensure_ascii=False)
    for name, content in (("p.jsonl", text), ("p.json", f"[{text}]")):
        for encoding in ("utf-8-sig", "utf-16"):
            (tmp_path / name).write_text(content, encoding=encoding)
            assert open_pages(str(tmp_path), 9).page(0).chunks[0].text == "a\u2028b"
        (tmp_path / name).unlink()


def test_synthdog_chunks_get_the_box_around_their_corners(tmp_path: Path) -> None:
    image_file(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps(SYNTHDOG))
    page = open_pages(str(tmp_path), 9).page(0)
    assert [(chunk.text, chunk.box) for chunk in page.chunks] == [("tilted", (2.5, 2, 12, 9))]


def test_synthdog_as_the_reference_unpacks_it(tmp_path: Path) -> None:
    """Images as files, named by their whole path; corners may be two, opposite ones."""
    image_file(tmp_path)
    record = {
        "id": 0,
        "image_name": str(tmp_path / "a.png"),
        "2_coord": [{"chunk": "word", "coord": [[3, 2], [12, 8]]}],
    }
    (tmp_path / "synthdog-en.json").write_text(json.dumps([record]))
    page = open_pages(str(tmp_path), 9).page(0)
    assert page.image.size == (40, 30)
    assert [(chunk.text, chunk.box) for chunk in page.chunks] == [("word", (3, 2, 12, 8))]


def test_synthdog_as_parquet_with_the_images_inside(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = image_file(tmp_path)
    record = SYNTHDOG | {"image": {"bytes": data, "path": None}}
    parquet.write_table(arrow.Table.from_pylist([record, record]), tmp_path / "train-0.parquet")
    source = open_pages(str(tmp_path), 9)
    assert source.n_pages == 2
    page = source.page(1)
    assert np.array_equal(np.asarray(page.image), np.asarray(Image.open(BytesIO(data))))
    assert page.chunks[0].text == "tilted"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("no json", "not a JSON file"),
        pytest.param("[" * 100_000, "not a JSON file", id="nested"),
        ({"image": "a.png"}, "expected a list of pages, found dict"),
        ([1], "page 1: expected an object, found int"),
        (
            [OWN, {"image": "a.png", "words": []}],
            'page 2: expected "chunks" or "2_coord", found image, words',
        ),
        ([{"chunks": []}], '"image" must be a file name'),
        ([OWN | {"chunks": {}}], '"chunks" is not a list'),
        ([OWN | {"chunks": [{"box": [1, 2, 3, 4]}]}], 'a chunk needs a "text"'),
        ([OWN | {"chunks": [{"text": "x", "box": [5, 2, 3, 4]}]}], "chunk 'x' needs a \"box\""),
        ([OWN | {"chunks": [{"text": "x", "box": [1, 2, 3]}]}], "chunk 'x' needs a \"box\""),
        (
            [{"image": "a.png", "2_coord": [{"chunk": "x", "coord": [[1, 2, 3]]}]}],
            'the "coord" of its corners',
        ),
        ([], "holds no pages"),
    ],
)
def test_pages_that_cannot_be_read_are_one_line(tmp_path: Path, content: object, reason: str) -> None:
    image_file(tmp_path)
    (tmp_path / "pages.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SparseMMError) as caught:
        open_pages(str(tmp_path), 9)
    assert reason in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_none_is_named_with_its_page(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not a picture")
    (tmp_path / "pages.json").write_text(json.dumps([OWN]))
    with pytest.raises(SparseMMError, match=r"page 1, .*a\.png: not an image that can be read"):
        open_pages(str(tmp_path), 9).page(0)


def test_what_else_is_wrong_is_one_line(tmp_path: Path) -> None:
    for call, reason in (
        (lambda: open_pages("no-such-folder", 1), "there is no folder no-such-folder"),
        (lambda: open_pages(str(tmp_path), 1), r"no \.json, \.jsonl or \.parquet"),
        (lambda: open_pages("grid", 0), "the number of pages is 0: it must be 1 to"),
        (lambda: open_pages("grid", 1, seed=99), "the seed is 99: it must be 0 to 98"),
        (lambda: open_pages("documents", 1, size=(40, 40)), "a page of 40 x 40 pixels"),
        (lambda: page_size("large"), "the page size is 'large'"),
    ):
        with pytest.raises(SparseMMError, match=reason):
            call()
    assert page_size("896x672") == (896, 672)
