"""What foreign files leave unsaid, and a user adds: flags of `whipstaff vectors convert`, parameters of an upload."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from whipstaff.steering.shape import Site
from whipstaff.steering.where import Clause


class Hints(BaseModel):
    """Those with a path name further files on this machine: never from a request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int | None = Field(None, ge=0, description="block, from 0, where the file names none; TaRot: the first")
    site: Site | None = Field(None, description="where the file names none")
    method: str | None = Field(None, max_length=64, description="of the methods that can use the file's numbers")
    key: str | None = Field(None, max_length=256, description="which entry of a file with several")
    part: int | None = Field(
        None, ge=0, description="which of several, from 0: edits per layer (pyreft), tasks (PEFT), prompts (caches)"
    )
    positions: str | None = Field(None, max_length=32, description="pyreft's clause, such as f7+l7")
    num_heads: int | None = Field(None, gt=0, description="only the best so many heads")
    input_scale: float | None = Field(None, gt=0, allow_inf_nan=False, description="SAELens' activation norm factor")
    projected: bool = Field(False, description="that baked biases were multiplied by W_o, whatever their config says")
    heads: Path | None = Field(None, description=".npy of rows (layer, head), best first")
    labels: Path | None = Field(None, description=".npy of 0 and 1, one per row of the features")
    tuning: Path | None = Field(None, description=".npy of further features, for the standard deviations")
    sigma: Path | None = Field(None, description=".npy of standard deviations [layers, heads]")
    alphas: Path | None = Field(None, description=".pt of SITE's alphas [layers, heads]")
    effects: Path | None = Field(None, description=".pt of indirect effects [prompts, layers, heads]")
    weights: Path | None = Field(None, description="the base model's folder, for its output projections")
    ignore: str | None = Field(
        None, max_length=4096, description="names in the file, with commas between, that are known to change nothing"
    )
    # for any format
    scale: float | None = Field(None, allow_inf_nan=False, description="strength when a request names none")
    where: Clause | None = Field(None, description="tokens when a request names none")
    defaults: dict[str, Any] = Field({}, description="the method's other parameters when a request names none")
    description: str = Field("", max_length=4096)
    licence: str = Field("", max_length=128)


HEADER = frozenset({"scale", "where", "defaults", "description", "licence"})  # said of the vector, not of the file
COMMON = HEADER | {"ignore"}  # what any format takes
