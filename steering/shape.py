"""The shape of a model as steering sees it: its sites and how wide they are."""

from typing import Literal

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

    def fits(self, other: "ModelShape") -> bool:
        """Whether what was made for this shape can be used on the other."""
        same = self.model_dump(exclude={"architecture", "num_kv_heads", "num_experts"})
        return all(getattr(other, name) == value for name, value in same.items()) and all(
            0 in (mine := getattr(self, name), theirs := getattr(other, name)) or mine == theirs
            for name in ("num_kv_heads", "num_experts")  # 0: it does not matter, or there are none
        )

    def width(self, site: Site) -> int:
        """Numbers per token at a site."""
        if site == "attn_head":
            return self.num_heads * self.head_dim
        return self.num_experts if site == "router" else self.hidden_size
