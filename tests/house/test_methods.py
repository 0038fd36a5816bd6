"""Methods know about themselves: outside their own files nobody tells steering methods apart by name or class."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from whipstaff.steering.methods import METHODS

ROOT = Path(__file__).parents[2]
OWN = [ROOT / "steering" / room for room in ("methods", "kinds", "importers", "fit")]
FILES = [
    path
    for room in ("steering", "server", "decoding")
    for path in sorted((ROOT / room).rglob("*.py"))
    if not any(path.is_relative_to(own) for own in OWN)
]
TELLING = ("method.name", "header.method")  # how the code says which method a vector has
KINDS_TOLD_APART = ROOT / "server" / "engine" / "worker" / "edits"  # what workers make of each


def faults(source: str, is_worker: bool = False) -> Iterator[str]:
    """What a file knows of single methods or kinds."""
    tree = ast.parse(source)
    classes: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith("whipstaff.steering.methods."):
                yield f"line {node.lineno} imports {node.module}"
            if node.module.startswith("whipstaff.steering.kinds."):
                classes |= {alias.name for alias in node.names if alias.name.endswith(("Method", "Kind"))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            if any(side.endswith(TELLING) for side in sides) and _names(node):
                yield f"line {node.lineno} compares the name of a method"
            if any(side.endswith("method.kind") for side in sides) and not is_worker:
                yield f"line {node.lineno} tells kinds apart"
        if isinstance(node, ast.Match) and ast.unparse(node.subject).endswith((*TELLING, "method.kind")):
            yield f"line {node.lineno} matches methods or kinds"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            if asked & classes:
                yield f"line {node.lineno} asks for the class of a method"


def _names(node: ast.AST) -> bool:
    """Whether an expression has a method's name in it."""
    return any(isinstance(one, ast.Constant) and one.value in METHODS for one in ast.walk(node))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_knows_single_methods(path: Path) -> None:
    assert [*faults(path.read_text(), path.is_relative_to(KINDS_TOLD_APART))] == []


@pytest.mark.parametrize(
    "source",
    [
        "from whipstaff.steering.methods.mote import MoTE",
        "is_it = vector.method.name == 'iti'",
        "is_it = vector.header.method in ('caa', 'iti')",
        "from whipstaff.steering.kinds.attention import AttentionMethod\nisinstance(method, AttentionMethod)",
        "is_it = vector.method.kind is EDITS",
        "match method.name:\n    case 'sae': pass",
    ],
)
def test_such_knowledge_is_found(source: str) -> None:
    assert [*faults(source)]
