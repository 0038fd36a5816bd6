"""Entries that edit attention are checked against the model and the prompt: a bad key would reach the engine."""

from typing import Any

import pytest
from catalogues import check

from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.errors import BadRequest, Unavailable, WhipstaffError
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import VectorSnapshot
from whipstaff.steering.served import AttentionAbilities
from whipstaff.steering.shape import ModelShape

SHAPE = ModelShape(architecture="Toy", hidden_size=16, num_layers=3, num_heads=2, head_dim=8)
FACTS = AttentionAbilities([0, 1, 2], bias=[0, 1], windows={1: 8})
HAVE = Capabilities(VectorSnapshot({}, SHAPE), {}, num_layers=3, attention=FACTS)
PROMPT_LEN = 20


def refusal(entry: dict[str, Any], caps: Capabilities = HAVE) -> WhipstaffError:
    with pytest.raises(WhipstaffError) as caught:
        compiled = compile_extras({"steering": [entry]}, caps)
        assert compiled is not None
        check(compiled, PROMPT_LEN, 8)
    return caught.value


def override(layer: int, *keys: int, **more: Any) -> dict[str, Any]:
    return {"method": "attention_override", "edits": [{"layer": layer, "head": 0, "keys": list(keys)}], **more}


@pytest.mark.parametrize(
    ("entry", "param"),
    [
        (override(0, 3, 20), "edits[0].keys[1]"),
        (override(0, -21), "edits[0].keys[0]"),
        (override(1, 11), "edits[0].keys[0]"),  # eight tokens back is as far as layer 1 sees
        (override(0, 5, where={"prompt": [[3, 6]]}), "edits[0].keys[0]"),  # token 3 cannot look at 5
        (override(3, 1), "edits[0].layer"),
        (override(0, 1, scale=2), "scale"),
        (override(0, 1, when={"probe": "p", "above": 1}), "when.probe"),
        (override(0, 1, renorm=True), "renorm"),
        ({"method": "pasta", "heads": {"2": [0]}, "spans": [[0, 3]]}, "heads.2"),
        ({"method": "pasta", "heads": {"0": [2]}, "spans": [[0, 3]]}, "heads.0[0]"),
        ({"method": "mote", "experts": {"0": {"off": [1]}}}, "method"),
        ({"method": "caa"}, "method"),
        ({"method": "pasta", "vector": "x", "heads": {"0": [0]}, "spans": [[0, 3]]}, None),
    ],
)
def test_bad_entries_name_their_field(entry: dict[str, Any], param: str | None) -> None:
    said = refusal(entry)
    assert said.param == "steering[0]" + ("" if param is None else f".{param}")


def test_good_keys_pass() -> None:
    for entry in (override(0, 0, 19, -1), override(1, 12, -8), override(2, 3, where={"prompt": [[3, 6]]})):
        compiled = compile_extras({"steering": [entry]}, HAVE)
        assert compiled is not None and check(compiled, PROMPT_LEN, 8) == 8


def test_without_the_flag_the_flag_is_named() -> None:
    said = refusal(override(0, 1), Capabilities(VectorSnapshot({}, SHAPE), {}, num_layers=3))
    assert isinstance(said, Unavailable) and "--steering-sites attention" in said.message
    assert isinstance(refusal(override(0, 99)), BadRequest)
