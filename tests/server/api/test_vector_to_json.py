"""What an owner is told of a vector: also of zeros in a file that was uploaded as it is."""

from pathlib import Path

import torch

from whipstaff.server.api.generate import vector_to_json
from whipstaff.server.registry.vectors import Entry
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, packed, parse

SHAPE = ModelShape(architecture="LlamaForCausalLM", hidden_size=16, num_layers=3, num_heads=2, head_dim=8)


def test_zeros_are_warned_of_at_upload() -> None:
    tensors = {"resid_post.0.add": torch.ones(16), "resid_post.1.add": torch.zeros(16)}
    told = {"warnings": ["made in a hurry"]}
    vector = parse(packed(Header(method="caa", model=SHAPE, provenance=told), tensors))
    said = vector_to_json(Entry("calm", Path("calm.safetensors"), vector, None, False))
    assert said["warnings"] == ["made in a hurry", "add of resid_post.1 is all zeros"]
