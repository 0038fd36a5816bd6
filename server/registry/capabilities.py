"""What a server has for requests to name, and what its operator allows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from whipstaff.decoding.method import Depth
from whipstaff.server.errors import NotFound
from whipstaff.server.prompt.vocabulary import Vocabulary
from whipstaff.server.registry.presets import Preset
from whipstaff.server.registry.vectors import VectorSnapshot
from whipstaff.steering.edits import Lengths
from whipstaff.steering.method import HookPoint
from whipstaff.steering.routing_scheme import Scheme


@dataclass(frozen=True)
class Limit:
    """What an operator allows: edits beyond a relative dose are refused, or weakened until they keep to it."""

    max_dose: float
    policy: Literal["refuse", "clamp"] = "refuse"


@dataclass(frozen=True)
class Capabilities:
    """What this server has for requests to name."""

    registry: VectorSnapshot
    auxiliaries: Mapping[str, int]  # name -> longest sequence it can follow
    words: Vocabulary | None = None  # the served model's tokens; None: this server runs without a tokenizer
    vocabulary: int = 0  # rows of the served model's head
    max_len: int = 1 << 30  # tokens of a sequence
    max_seqs: int = 1 << 30  # sequences at once
    max_adapters: int = 0  # LoRA adapters in use at once
    dtype: str = "float32"  # of the served model's activations
    num_slots: int = 256  # rows of edits in use at once
    num_histories: int = 64  # conditions in use at once
    num_layers: int = 1
    hook_points: frozenset[HookPoint] = frozenset()  # where edits can be made
    lengths: Lengths = field(default_factory=lambda: Lengths({}))
    limit: Limit | None = None
    tensor_parallel: int = 1
    takes_soft_prompts: bool = True
    logprobs_mode: str = "raw_logprobs"  # vLLM's
    attention: Mapping[str, Any] | None = None  # what the attention layers obey; None: they were left alone
    depth: Depth = Depth(1)  # noqa: RUF009 - a tuple
    looks_ahead: bool = False  # whether methods may try tokens before one is chosen
    routing: Mapping[int, Scheme] = field(default_factory=dict)  # how each layer with experts selects them
    presets: Mapping[str, Preset] = field(default_factory=dict)

    def preset(self, name: str, param: str | None = None) -> Preset:
        """Raises: NotFound."""
        if name not in self.presets:
            names = ", ".join(map(repr, self.presets)) or "none; start it with --presets, or upload one"
            raise NotFound(f"there is no preset {name!r}; this server has: {names}", param)
        return self.presets[name]
