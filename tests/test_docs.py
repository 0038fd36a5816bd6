"""Documents are true of the tree: what is generated is current, what is named is there, and every paper is cited."""

import ast
import importlib
import re
import runpy
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whipstaff.decoding.methods import METHODS as DECODING
from whipstaff.server import __version__
from whipstaff.steering.methods import METHODS as STEERING

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
)
CITATION = (ROOT / "CITATION.cff").read_text()
CHECKED = (".py", ".sh", ".md", ".lock", ".toml", ".cff", ".svg", ".cu", ".cuh", ".cpp", ".h")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def script(name: str) -> dict[str, Any]:
    """The globals of a program of docs/."""
    return runpy.run_path(str(ROOT / "docs" / name))


def test_the_picture_of_the_rooms_is_current() -> None:
    """Run `make docs` where this fails."""
    draw = script("draw.py")
    assert (ROOT / "docs" / "architecture.svg").read_text() == draw["drawn"]()


def test_what_is_written_from_the_code_is_current() -> None:
    """Run `make docs` where this fails."""
    for name, text in script("reference.py")["written"]().items():
        assert (ROOT / "docs" / name).read_text() == text, name


def test_the_readme_shows_and_does_not_list() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_document_is_reached_from_the_readme() -> None:
    """Those for people: what lies among tests is for who reads them."""
    found, pending = set(), [ROOT / "README.md"]
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending += [target for target, _ in links(path) if target.suffix == ".md"]
    assert {path for path in DOCUMENTS if "tests" not in path.parts} <= found


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """The files of ours that a document links to, each with the heading, if one is named."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if "://" not in target:
            yield (path.parent / file).resolve() if file else path, anchor


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub names them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in links(path):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target} has no heading {anchor}"


@each_document
def test_files_and_folders_that_are_named_are_there(path: Path) -> None:
    """In backticks: from the root, from the document's folder, or from the folder of `server/` that it speaks of."""
    for name in re.findall(r"`([\w.{},/-]+)`", path.read_text()):
        for one in expanded(name):
            if one.endswith(CHECKED) or (one.endswith("/") and not one.startswith("/")):
                assert any((folder / one).exists() for folder in (ROOT, path.parent, ROOT / "server")), one


def expanded(name: str) -> list[str]:
    """`a/{b,c}` as two names."""
    head, brace, rest = name.partition("{")
    inner, _, tail = rest.partition("}")
    return [one for part in inner.split(",") for one in expanded(head + part + tail)] if brace else [name]


@pytest.mark.parametrize("name", ["request-path.md", "extending.md"])
def test_names_of_the_code_are_in_the_code(name: str) -> None:
    told = re.findall(r"`([A-Za-z_][\w.]*)(?:\([\w, ]*\))?`", (ROOT / "docs" / name).read_text())
    files = [path for room in ("server", "steering", "decoding", "cuda_ext") for path in (ROOT / room).rglob("*.py")]
    known = {word for path in files for word in re.findall(r"\w+", path.read_text())}
    named = {one for one in told if not one.endswith(CHECKED)}
    assert sorted(one for one in named if not known.issuperset(one.split("."))) == []


@each_document
def test_what_programs_import_is_there(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("whipstaff."):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_the_glossary_is_short_and_in_order() -> None:
    rows = re.findall(r"^\| (.+?) \| ", (ROOT / "docs" / "glossary.md").read_text(), re.M)[1:]
    assert len(rows) <= 30 and rows == sorted(rows)


def test_every_room_is_in_the_table_of_rooms() -> None:
    told = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.parent for path in (ROOT / "server").glob("*/__init__.py")}
    assert [room.name for room in rooms if f"| `server/{room.name}/` |" not in told] == []


# ---- versions and papers


def test_the_version_is_the_same_everywhere() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert __version__ == declared
    assert f"\nversion: {declared}\n" in CITATION
    assert f"\n## {declared} (" in (ROOT / "CHANGELOG.md").read_text()


def test_every_paper_that_a_method_names_is_cited() -> None:
    notes = dict(re.findall(r'url: "https://arxiv.org/abs/([\d.]+)"\n    notes: "(.+)"', CITATION))
    assert len(notes) == CITATION.count("arxiv.org/abs/")
    papers = {name: method.paper for name, method in STEERING.items()}
    papers |= {name: method.paper for name, method in DECODING.items()}
    for name, named in papers.items():
        for paper in re.findall(r"arXiv:(\d{4}\.\d{5})", named):
            assert name in notes[paper].split(", "), (name, paper)
    for path in DOCUMENTS:
        assert set(re.findall(r"arXiv:(\d{4}\.\d{5})", path.read_text())) <= notes.keys(), path
