"""The package is in layers: a module imports what stands below it, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from helpers.paths import ROOT

PACKAGE = ROOT / "sparsemm_edge"

# top to bottom; parts of one line do not import each other
LAYERS = (
    ("cli",),
    ("commands",),
    ("demo", "server", "chat"),
    ("reports",),
    ("convert", "inspection", "scoring", "profiling"),
    ("evaluation", "versions"),
    ("runtime",),
    ("image_urls", "extras", "output"),
)
RUNTIME = (
    ("generate",),
    ("conversation",),
    ("session_file", "estimate"),
    ("context",),
    ("encode",),
    ("model",),
    ("chat_template", "prompt", "loading", "sampler", "attention"),
    ("builtin_templates", "image_file", "image_store", "process", "first_token"),
    ("disk_cache", "data_file"),
    ("library",),
    ("eviction",),
)


TESTS = ROOT / "tests"
TEST_FOLDERS = ("unit", "llama", "cli", "reference")


def modules() -> dict[str, Path]:
    """The file of each module, by its dotted name."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports() -> dict[str, set[str]]:
    """What each module imports of this package, wherever in the file, under TYPE_CHECKING too."""
    files = modules()
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsemm_edge"):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found[name].add(whole if whole in files else str(node.module))
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = imports()
    assert len(graph) > 90 and "sparsemm_edge.runtime.model" in graph["sparsemm_edge.runtime.encode"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_runtime_imports_point_down() -> None:
    level = {name: i for i, names in enumerate(RUNTIME) for name in names}
    prefix = "sparsemm_edge.runtime."
    assert level.keys() == {name.removeprefix(prefix) for name in modules() if name.startswith(prefix)}
    for name, wanted in imports().items():
        if name.startswith(prefix):
            for other in wanted:
                if other.startswith(prefix):
                    here, there = name.removeprefix(prefix), other.removeprefix(prefix)
                    assert level[there] > level[here], f"{here} imports {there}"


def test_packages_import_what_is_below_them() -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for name, wanted in imports().items():
        here = name.split(".")[1] if "." in name else ""
        for other in wanted:
            there = other.split(".")[1] if "." in other else ""
            if there != here and there in level and here in level:
                assert level[there] > level[here], f"{name} imports {other}"
            elif there in level:
                assert here in level or there == here, f"{name} imports {other}, which is above it"


def test_tests_import_helpers_and_no_other_test() -> None:
    """And every test file is in one of the four folders, with a name that no other one has."""
    files = sorted(TESTS.rglob("test_*.py"))
    assert {path.parent.relative_to(TESTS).as_posix() for path in files} == set(TEST_FOLDERS)
    assert len({path.name for path in files}) == len(files) > 50
    others = {path.stem for path in files} | {"conftest", *TEST_FOLDERS}
    for path in (*files, *(TESTS / "helpers").glob("*.py"), TESTS / "conftest.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "."]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] not in others, f"{path.relative_to(ROOT)} imports {name}"
