"""Layout: what of Whipstaff's set-up shapes the compiled model.

It rides in vLLM's `additional_config`, which enters the compile-cache key, so a graph with our hooks is never loaded
into an engine without them, nor the other way round.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

from whipstaff.steering.shape import ModelShape, Site
from whipstaff.steering.sites import CORE

LAYOUT_KEY = "whipstaff"


class AuxiliarySpec(BaseModel):
    """An auxiliary model to load beside the base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: str
    max_len: int  # positions the model knows; longer requests that need it are refused


class Layout(BaseModel):
    """Everything a worker needs to know before it loads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str  # of Whipstaff
    num_slots: int  # rows of edits in use at once; see `steering.tables`
    shape: ModelShape
    num_histories: int = 0  # conditions in use at once
    max_len: int = 0  # positions of a history
    sites: tuple[Site, ...] = CORE  # where edits can be made
    edits_attention: bool = False
    encoders: tuple[tuple[Site, int, int], ...] = ()  # (site, layer, features) of TopK autoencoders
    early_layers: tuple[int, ...] = ()  # whose streams can be kept; see `steering.plan.StreamCopy`
    auxiliaries: tuple[AuxiliarySpec, ...] = ()
    looks_ahead: bool = False  # whether tokens can be tried before one is chosen; see `lookahead`
    reads_attention: bool = False  # whether what the last layer attends to can be read; see `last_attention`
    num_hidden_states: int = 0  # sequences whose hidden states are kept whole; see `hidden_histories`
    attention_layers: tuple[int, ...] = ()  # of which it can be told what their heads look at
    capture_layers: tuple[int, ...] = ()  # whose activations can be captured, at all sites
    max_capture_bytes: int = 0  # of activations that are captured at once, counted as float32
    has_plain_form: bool = True  # whether steps without edits run the model without sites; see `forms`
    num_drafts: int = 0  # tokens that may be drafted at once for each sequence; see `RequestPlan.undrafted_by`
    max_search_seqs: int = 0  # sequences that requests which search may hold at once, all together

    @property
    def limits(self) -> dict[str, int]:
        """The longest sequence that each auxiliary model can follow, by name."""
        return {spec.name: spec.max_len for spec in self.auxiliaries}

    def to_config(self) -> dict[str, Any]:
        return {LAYOUT_KEY: self.model_dump(mode="json")}

    @staticmethod
    def from_config(additional_config: Any) -> "Layout":
        return Layout.model_validate(additional_config[LAYOUT_KEY])
