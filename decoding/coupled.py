"""What methods that read further sequences have in common: when they hold."""

from typing import Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

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

    @field_validator("until")
    @classmethod
    def _begins_before(cls, until: int | None, info: ValidationInfo) -> int | None:
        if until is not None and until <= (start := info.data.get("start", 0)):
            raise ValueError(f"it would end at {until} generated tokens, before it begins at {start}")
        return until

    @field_validator("fade")
    @classmethod
    def _ends(cls, fade: str, info: ValidationInfo) -> str:
        if fade != "constant" and info.data.get("until") is None:
            raise ValueError(f"a {fade} fade ends somewhere; say `until`")
        return fade

    @property
    def window(self) -> Window:
        return Window(self.start, self.until, self.fade)
