"""What a server has for requests to name, and what its operator allows."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from whipstaff.decoding.method import Depth
from whipstaff.server.errors import NotFound
from whipstaff.server.prompt.vocabulary import Vocabulary
from whipstaff.server.registry.presets import Preset
from whipstaff.server.registry.vectors import VectorSnapshot
from whipstaff.steering.served import Served
from whipstaff.steering.shape import ModelShape


@dataclass(frozen=True)
class Capabilities(Served):
    """What this server has for requests to name."""

    registry: VectorSnapshot
    auxiliaries: Mapping[str, int]  # name -> longest sequence it can follow
    words: Vocabulary | None = None  # the served model's tokens; None: this server runs without a tokenizer
    vocabulary: int = 0  # rows of the served model's head
    max_len: int = 1 << 30  # tokens of a sequence
    max_seqs: int = 1 << 30  # sequences at once
    max_adapters: int = 0  # LoRA adapters in use at once
    num_slots: int = 256  # rows of edits in use at once
    num_histories: int = 64  # conditions in use at once
    num_layers: int = 1
    logprobs_mode: str = "raw_logprobs"  # vLLM's
    depth: Depth = Depth(1)  # noqa: RUF009 - a tuple
    looks_ahead: bool = False  # whether methods may try tokens before one is chosen
    reads_attention: bool = False  # whether methods may read what the last layer attends to
    num_hidden_states: int = 0  # requests whose hidden states are kept at once
    capture_layers: frozenset[int] = frozenset()  # whose activations can be captured
    max_capture_bytes: int = 0  # of activations that are captured at once, counted as float32
    attention_layers: frozenset[int] = frozenset()  # of which it can be told what their heads look at
    keeps_captures: bool = False  # whether what is captured can be had as a file to fetch
    max_search_seqs: int = 1 << 30  # sequences that all searches may have at once
    num_drafts: int = 0  # tokens that are drafted at once for a sequence
    presets: Mapping[str, Preset] = field(default_factory=dict)

    @property
    def model(self) -> ModelShape:
        return self.registry.model

    def preset(self, name: str, param: str | None = None) -> Preset:
        """Raises: NotFound."""
        if name not in self.presets:
            names = ", ".join(map(repr, self.presets)) or "none; start it with --presets, or upload one"
            raise NotFound(f"there is no preset {name!r}; this server has: {names}", param)
        return self.presets[name]
