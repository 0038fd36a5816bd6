"""A vector file keeps every bit, and one that is not what it says is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from whipstaff.steering import vector_file
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, Vector, parse
from whipstaff.steering.where import Where

SHAPE = ModelShape(architecture="Test", hidden_size=8, num_layers=4, num_heads=2, head_dim=4)
TENSORS = {
    "resid_post.1.add": torch.linspace(-1, 1, 8),
    "resid_post.3.add": torch.full((8,), 0.1),
    "resid_post.3.gain": torch.full((8,), -1.0),
    "attn_head.0.add": torch.arange(8.0).reshape(2, 4),
}


def packed(tensors: dict[str, Tensor] | None = None, header: dict[str, Any] | None = None) -> bytes:
    """A vector file, right or wrong: nothing is checked."""
    said = {"method": "test", "model": SHAPE.model_dump()} | (header or {})
    return save(TENSORS if tensors is None else tensors, metadata={"whipstaff": json.dumps(said)})


def test_a_vector_file_keeps_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    odd = {"resid_post.0.add": torch.tensor([1e-45, -0.0, 3.4e38 / 64, 1 / 3, 2**-126, -1.0, 0.1, 7.0])}
    header = Header(method="caa", model=SHAPE, scale=0.1, where=Where(prompt=[(-3, None)]), provenance={"seed": 1})
    vector_file.write(path, header, odd)
    vector = vector_file.read(path)
    want = odd["resid_post.0.add"].view(torch.int32)  # bits: -0.0 is not 0.0 here
    assert torch.equal(vector.tensors[HookPoint("resid_post", 0)]["add"].view(torch.int32), want)
    assert vector.header == header
    vector_file.write(path, header, {"resid_post.0.add": vector.tensors[HookPoint("resid_post", 0)]["add"]})
    assert vector_file.read(path).digest == vector.digest


@settings(max_examples=50, deadline=None)
@given(numbers=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=8, max_size=8))
def test_any_finite_numbers_come_back_as_they_went(numbers: list[float]) -> None:
    given_ = torch.tensor(numbers, dtype=torch.float32).reshape(2, 4)
    got = parse(packed({"attn_head.2.gain": given_})).tensors[HookPoint("attn_head", 2)]["gain"]
    assert torch.equal(got.view(torch.int32), given_.view(torch.int32))


def test_half_precision_files_are_read_exactly() -> None:
    numbers = torch.randn(8, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        got: Vector = parse(packed({"resid_post.0.add": numbers.to(dtype)}))
        assert torch.equal(got.tensors[HookPoint("resid_post", 0)]["add"], numbers.to(dtype).to(torch.float32))


def test_norms_and_layers_describe_the_file() -> None:
    vector = parse(packed())
    assert vector.layers == [0, 1, 3] and vector.sites == ["attn_head", "resid_post"]
    assert vector.norms() == {name: pytest.approx(float(tensor.norm())) for name, tensor in TENSORS.items()}


def with_number(number: float) -> dict[str, Tensor]:
    tensor = torch.zeros(8)
    tensor[3] = number
    return {"resid_post.0.add": tensor}


LYING: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a sound safetensors file"),
    "text": (b"a vector, honestly" * 9, "not a sound safetensors file"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins", "not a sound safetensors file"),
    "truncated": (packed()[:-4], "not a sound safetensors file"),
    "header cut": (packed()[:40], "not a sound safetensors file"),
    "header not an object": ((2).to_bytes(8, "little") + b"[]", "not a sound safetensors file"),
    "header too deep": ((40_000).to_bytes(8, "little") + b"[" * 40_000, "not a sound safetensors file"),
    "header length absurd": (b"\xff" * 8 + b"{}", 'no "whipstaff" metadata'),
    "more bytes": (packed() + b"more", "not a sound safetensors file"),
    "no metadata": (save(TENSORS), 'no "whipstaff" metadata'),
    "metadata not JSON": (save(TENSORS, metadata={"whipstaff": "{"}), "header field"),
    "no tensors": (packed({}), "no tensors"),
    "unknown header field": (packed(header={"colour": "red"}), "header field colour"),
    "another format": (packed(header={"format": 2}), "header field format"),
    "no model": (packed(header={"model": None}), "header field model"),
    "absurd model": (packed(header={"model": SHAPE.model_dump() | {"num_heads": 0}}), "header field model.num_heads"),
    "scale NaN": (packed(header={"scale": math.nan}), "header field scale"),
    "bad clause": (packed(header={"where": "sometimes"}), "header field where"),
    "unknown site": (packed({"mlp.0.add": torch.ones(8)}), "names are"),
    "layer 01": (packed({"resid_post.01.add": torch.ones(8)}), "names are"),
    "layer beyond": (packed({"resid_post.4.add": torch.ones(8)}), "layers 0 to 3"),
    "short row": (packed({"resid_post.0.add": torch.ones(7)}), r"shape \[7\].*\[8\]"),
    "extra dimension": (packed({"resid_post.0.add": torch.ones(1, 8)}), r"shape \[1, 8\]"),
    "heads flattened": (packed({"attn_head.0.add": torch.ones(8)}), r"shape \[8\].*\[2, 4\]"),
    "integers": (packed({"resid_post.0.add": torch.ones(8, dtype=torch.int64)}), "dtype torch.int64"),
    "NaN": (packed(with_number(math.nan)), "not finite"),
    "infinity": (packed(with_number(-math.inf)), "not finite"),
    "beyond float32": (packed({"resid_post.0.add": torch.full((8,), 1e300, dtype=torch.float64)}), "not finite"),
}


@pytest.mark.parametrize("case", LYING)
def test_a_file_that_is_not_what_it_says_is_refused(case: str, tmp_path: Path) -> None:
    data, words = LYING[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(SteeringError, match=words):
        vector_file.read(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_still_a_sound_vector(data: st.DataObject) -> None:
    original = bytearray(packed())
    index = data.draw(st.integers(0, len(original) - 1))
    original[index] ^= data.draw(st.integers(1, 255))
    try:
        vector = parse(bytes(original))
    except SteeringError:
        return
    assert vector.digest != parse(packed()).digest
    assert all(tensor.isfinite().all() for parts in vector.tensors.values() for tensor in parts.values())


def test_write_refuses_what_read_would_not_take(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    with pytest.raises(SteeringError, match="not finite"):
        vector_file.write(path, Header(method="caa", model=SHAPE), with_number(math.nan))
    assert not path.exists()


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(vector_file.MAX_BYTES + 1)  # sparse
    with pytest.raises(SteeringError, match="at most"):
        vector_file.read(path)
