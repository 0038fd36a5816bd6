"""The shape of a model as steering sees it: its sites and how wide they are."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Site = Literal["resid_pre", "resid_post", "attn_in", "attn_head", "attn_out", "mlp_in", "mlp_out", "router"]
SITES: dict[Site, str] = {
    "resid_pre": "the residual stream entering a block",
    "attn_in": "what the attention receives: the output of the norm before it",
    "attn_head": "head outputs, before the output projection",
    "attn_out": "the attention's output, after the output projection",
    "mlp_in": "what the MLP receives: the output of the norm before it",
    "router": "router logits of a mixture of experts",
    "mlp_out": "the MLP's output",
    "resid_post": "the residual stream leaving a block",
}


class ModelShape(BaseModel):
    """What a vector must agree on with the model it is used on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str = Field(description="informative; structure, not the name, decides whether a vector fits")
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    num_kv_heads: int = Field(0, ge=0, description="0 where a vector does not care")
    num_experts: int = Field(0, ge=0, description="routed experts per layer; 0 for dense models")

    def fits(self, other: "ModelShape", has_heads: bool = True) -> bool:
        """Whether what was made for this shape can be used on the other.

        Args:
            has_heads: whether it holds numbers of single heads; what does not care about their size.
        """
        every = ("hidden_size", "num_layers", "num_heads", *(("head_dim",) if has_heads else ()))
        return all(getattr(self, name) == getattr(other, name) for name in every) and all(
            0 in (mine := getattr(self, name), theirs := getattr(other, name)) or mine == theirs
            for name in (*(("num_kv_heads",) if has_heads else ()), "num_experts")
        )

    def width(self, site: Site) -> int:
        """Numbers per token at a site."""
        if site == "attn_head":
            return self.num_heads * self.head_dim
        return self.num_experts if site == "router" else self.hidden_size


def config_shape(config: Any, text: Any = None) -> ModelShape:
    """The whole model's shape, from its config: the same for a folder on a disk and for a model that is served.

    Args:
        config: a transformers config; only read.
        text: the part of it that describes the language model; None: as transformers finds it.

    Raises: AttributeError where the config says too little, ValueError where it makes no sense.
    """
    text = config.get_text_config() if text is None else text
    num_layers = text.num_layers if text.model_type == "longcat_flash" else text.num_hidden_layers  # or sublayers
    num_heads: int = getattr(text, "num_attention_heads", 0) or 1  # a model without attention counts as one head
    return ModelShape(
        architecture=(config.architectures or ["unnamed"])[0],
        hidden_size=text.hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=_first(text, _HEAD_DIM) or text.hidden_size // num_heads,
        num_kv_heads=_num_kv_heads(text) or num_heads,
        num_experts=_num_experts(text),
    )


# Under latent attention a head has one size as a query and another, the first here, as what it gives.
_HEAD_DIM = ("v_head_dim", "head_dim", "hidden_size_per_head", "attention_head_dim")
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")


def _num_kv_heads(text: Any) -> int:
    """0 where every head has keys and values of its own."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    if blocks := [block.attention for block in _blocks(text) if not getattr(block.attention, "no_op", True)]:
        return int(text.num_attention_heads // blocks[0].n_heads_in_group)
    return _first(text, _KV_HEADS) or _first(getattr(text, "attn_config", None), ("kv_n_heads",))


def _num_experts(text: Any) -> int:
    parts = (text, getattr(text, "ffn_config", None), *_blocks(text))
    return max(_first(part, _EXPERTS) for part in parts)


def _blocks(text: Any) -> Iterable[Any]:
    """The blocks of a model whose config describes each."""
    return getattr(text, "block_configs", None) or ()


def _usual(config: Any, name: str) -> Any:
    """What a config says, if it says anything; where transformers only says it of each layer, what most layers have."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError
        ((value, _),) = Counter(getattr(layer, name) for layer in config.per_layer_config).most_common(1)
        return value


def _first(config: Any, names: Iterable[str]) -> int:
    """The first number above 0 under one of these names; 0 where there is none."""
    for name in names:
        value = config.get(name) if isinstance(config, dict) else _usual(config, name)
        number = value[0] if isinstance(value, list) and value else value
        if isinstance(number, int) and number > 0:
            return number
    return 0
