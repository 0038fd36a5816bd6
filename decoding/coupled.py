"""What methods that read further sequences have in common: when they hold."""

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from whipstaff.decoding.method import Params
from whipstaff.decoding.mix import Window


class CoupledParams(Params):
    """From which generated token until which, and whether the effect fades."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    start: int = Field(0, ge=0, le=1 << 20, alias="from", description="generated tokens before it begins")
    until: int | None = Field(
        None, ge=1, le=1 << 20, description="generated tokens after which it ends, and costs nothing more"
    )
    fade: Literal["constant", "linear", "cosine"] = Field("constant", description="from full to nothing at `until`")

    @model_validator(mode="after")
    def _window_makes_sense(self) -> "CoupledParams":
        if self.until is not None and self.until <= self.start:
            raise ValueError(f"it would end at {self.until} generated tokens, before it begins at {self.start}")
        if self.fade != "constant" and self.until is None:
            raise ValueError(f"a {self.fade} fade ends somewhere; say `until`")
        return self

    @property
    def window(self) -> Window:
        return Window(self.start, self.until, self.fade)
