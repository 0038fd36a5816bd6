"""What methods that read further sequences have in common: when they hold, and how those sequences are steered."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from whipstaff.decoding.method import Params
from whipstaff.decoding.mix import Window


class CoupledParams(Params):
    """From which generated token until which, whether the effect fades, and the further sequences' steering."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    start: int = Field(0, ge=0, le=1 << 20, alias="from", description="generated tokens before it begins")
    until: int | None = Field(
        None, ge=1, le=1 << 20, description="generated tokens after which it ends, and costs nothing more"
    )
    fade: Literal["constant", "linear", "cosine"] = Field("constant", description="from full to nothing at `until`")
    steering: Any = Field(None, description="of its further sequences; none: the request's own, []: no steering")

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
