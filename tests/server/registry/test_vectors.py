"""Vector files are loaded by name, and known even where they do not fit."""

from pathlib import Path

import pytest
from catalogues import FILES, SHAPE

from whipstaff.server.errors import (
    NotFound,
    VectorUnfit,
)
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import BadVectorFile, VectorSnapshot, read_vectors


def test_names_are_file_names_and_unfit_vectors_are_known_but_not_usable(caps: Capabilities) -> None:
    registry = caps.registry
    assert registry.names == sorted(FILES.keys() - {"wide"})
    assert [entry.name for entry in registry] == sorted(FILES)
    with pytest.raises(VectorUnfit, match=r"hidden 16.*hidden 8"):
        registry.usable("wide", "p")
    with pytest.raises(NotFound, match=r"'ablate', .*'wide'"):
        registry.entry("clam")


def test_a_folder_and_single_files_load_alike(vector_files: Path) -> None:
    files = read_vectors([vector_files / "late.safetensors", vector_files / "calm.safetensors"])
    assert list(files) == ["late", "calm"]
    assert files["calm"].vector.digest == read_vectors([vector_files])["calm"].vector.digest


def test_a_bad_file_stops_the_start_and_is_named(vector_files: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the kind")
    for paths, words in (
        ([tmp_path / "absent"], "no such file or folder"),
        ([vector_files, vector_files / "calm.safetensors"], "two vectors are called 'calm'"),
        ([tmp_path], "broken.safetensors: not a sound safetensors file"),
    ):
        with pytest.raises(BadVectorFile, match=words):
            read_vectors(paths)


def test_of_many_names_a_message_has_the_nearest(vector_files: Path) -> None:
    files = read_vectors([vector_files])
    many = {f"other{number}": files["calm"] for number in range(30)} | {"calm": files["calm"]}
    for known, said in ((files, "'calm'"), (many, "'calm', ")):
        with pytest.raises(NotFound) as caught:
            VectorSnapshot(known, SHAPE).entry("calmm")
        assert said in str(caught.value)
    assert "'calm', 'other" in str(caught.value) and "and 28 more; start it" in str(caught.value)
