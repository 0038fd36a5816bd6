"""A request for each method that this server can run, which shows what it does: GET /v1/steering/methods has them.

Vector files may bring one of their own; methods say which parameters show them, on any model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from whipstaff.decoding.method import Method as DecodingMethod
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.method import Method
from whipstaff.steering.served import ModuleAbilities
from whipstaff.steering.vector_file import Vector

_PROMPT = "Question: Where does Mara live?\nAnswer:"
_MAX_TOKENS = 24
_LONG = {"prompt": "In the morning Mara opened the door, and", "max_tokens": 64}  # so that something repeats
_DRAWN = ("rule", "temperature", "truncation")  # stages that greedy answers show little of


def steered(
    method: Method[Any], vectors: Mapping[str, Vector], caps: Capabilities, model: str
) -> dict[str, Any] | None:
    """The body of a completion that shows a steering method; None for a condition, where its file brings none.

    Args:
        vectors: this server's of the method, by name.
    """
    greedy = {"model": model, "prompt": _PROMPT, "max_tokens": _MAX_TOKENS, "temperature": 0}
    if not method.needs_file and not vectors:
        trial = next(method.trials(ModuleAbilities(caps.attention, caps.routing)), None)
        return {**greedy, "steering": {"method": method.name, **(trial.setting if trial else method.example)}}
    name, vector = min(vectors.items(), key=lambda pair: pair[1].header.example is None)
    if (own := vector.header.example) is not None:
        entry = dict(own.get("steering") or {})
        if method.kind.named_in == "when":
            entry["when"] = {"probe": name, **(entry.get("when") or {})}
        else:
            entry["vector"] = name
        return {**greedy, **own, "steering": entry}
    if method.kind.named_in == "when":
        return None
    return {**greedy, "steering": {"vector": name, **method.example}}


def decoded(
    method: DecodingMethod[Any], heads: Mapping[str, str], streams: Sequence[str], model: str
) -> dict[str, Any] | None:
    """The same for a decoding method.

    Args:
        heads: for each parameter that has to name a learned head, one of this server's.
        streams: its auxiliary models.
    """
    shown = method.shown(streams, heads)
    if shown is None:
        return None
    drawn = {"temperature": 1, "seed": 0} if method.stage in _DRAWN else {"temperature": 0}
    asked = _LONG if method.stage == "penalty" else {"prompt": _PROMPT, "max_tokens": _MAX_TOKENS}
    return {"model": model, **asked, **drawn, "decoding": {"method": method.name, **shown}}
