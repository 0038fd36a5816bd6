"""The list of what we use of vLLM is complete, and the installed version is the one that it was reviewed against."""

from pathlib import Path

import pytest
from house.seam import LAID_OVER, REACHED, Seam, moved, recorded, said, version_of
from house.sources import Missing, Sources

from whipstaff.server.engine import SUPPORTED


@pytest.fixture(scope="module")
def vllm() -> Sources:
    return Sources("vllm")


def test_the_installed_vllm_is_as_reviewed(vllm: Sources) -> None:
    """A new version fails here with a list of exactly what moved, in a second and without an engine."""
    assert moved(recorded(version_of(vllm)), said(vllm)) == []


def test_every_supported_version_was_reviewed() -> None:
    for version in SUPPORTED:
        listed = recorded(version)
        assert listed, version
        assert [name for name, what in listed.items() if what.startswith("missing") and _is_needed(name)] == []


def _is_needed(name: str) -> bool:
    """Not what `compat.py` takes from elsewhere, or by another name, in that version."""
    compat = Seam(only="compat")
    return name not in compat.imported() and name.rpartition(".")[2] not in compat.read()


def test_every_class_laid_over_vllms_is_listed() -> None:
    assert {name for name, _ in Seam().classes()} == LAID_OVER.keys()


def test_every_private_member_that_is_reached_into_is_listed() -> None:
    listed = {name.rpartition(".")[2] for name in REACHED}
    assert Seam().private() - listed == set()


def test_what_is_listed_is_used() -> None:
    """Members that nobody reads any more leave the list."""
    assert {name.rpartition(".")[2] for name in REACHED} - Seam().read() == set()


@pytest.fixture
def package(tmp_path: Path) -> Sources:
    """A package with a base class in another module, a star import and an attribute that a function sets."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "__init__.py").write_text("from .sub import *\n")
    (tmp_path / "sub" / "__init__.py").write_text("from .base import Base as Named\nLIMIT = 3\n")
    (tmp_path / "sub" / "base.py").write_text(
        "class Base:\n    def __init__(self, size: int):\n        self.size: int = size\n"
        "    async def run(self, *, fast=False):\n        '''Says.'''\n        return fast\n"
        "def late(one):\n    one.register_buffer('_scale', 1)\n"
    )
    return Sources("thing", tmp_path)


def test_names_are_followed_through_imports_and_bases(package: Sources) -> None:
    assert package.find("thing.sub.Named.run").signature == "async (self, *, fast=False)"
    assert package.find("thing.sub.Named").signature == "(self, size)"
    assert package.find("thing.sub.Named.size").signature == "int"
    assert package.find("thing.sub.Named._scale").module == "thing.sub.base"
    assert package.find("thing.LIMIT").signature == "3"
    with pytest.raises(Missing, match=r"Base of thing\.sub\.base has no gone"):
        package.find("thing.sub.Named.gone")


def test_a_digest_is_of_what_runs(package: Sources) -> None:
    before, file = package.find("thing.sub.Named.run").digest, package.folder / "sub" / "base.py"
    file.write_text(file.read_text().replace("'''Says.'''", "'''Says more.'''  # and why"))
    assert Sources("thing", package.folder).find("thing.sub.Named.run").digest == before
    file.write_text(file.read_text().replace("return fast", "return not fast"))
    assert Sources("thing", package.folder).find("thing.sub.Named.run").digest != before
