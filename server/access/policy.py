"""What a key may do: a view of what the server has, and bounds on what a request says."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from whipstaff.decoding.methods import METHODS as DECODING
from whipstaff.server.errors import Forbidden
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Preset
from whipstaff.steering.methods import METHODS as STEERING
from whipstaff.steering.served import Limit

METHODS = frozenset((*STEERING, *DECODING))


class PerMinute(BaseModel):
    """Units that come back every minute; None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: int | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0, description="of prompts and answers")
    cost: int | None = Field(None, gt=0, description="tokens that are computed, of all sequences and models")


class Policy(BaseModel):
    """As a file of keys has it; None: whatever the server has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: frozenset[str] | None = None
    vectors: frozenset[str] | None = None
    presets: frozenset[str] | None = None
    forced_preset: str | None = None
    max_dose: float | None = Field(None, gt=0, allow_inf_nan=False)
    per_minute: PerMinute = PerMinute()
    burst: float = Field(1.0, gt=0, le=60, description="minutes whose units may be used at once")
    concurrent: int | None = Field(None, gt=0)
    max_tokens: int | None = Field(None, gt=0)
    n: int | None = Field(None, gt=0)
    prompts: int | None = Field(None, gt=0)

    @field_validator("methods")
    @classmethod
    def _are_known(cls, names: frozenset[str] | None) -> frozenset[str] | None:
        if unknown := sorted((names or frozenset()) - METHODS):
            raise ValueError(f"{unknown[0]!r} is no method")
        return names

    def check_counts(self, num_answers: int, num_prompts: int, max_tokens: int | None) -> None:
        """Of a request. Raises: Forbidden naming the field."""
        for said, most, param in (
            (num_answers, self.n, "n"),
            (num_prompts, self.prompts, "prompt"),
            (max_tokens, self.max_tokens, "max_tokens"),
        ):
            if most is not None and said is not None and said > most:
                raise Forbidden(f"this key may ask for at most {most}, not {said}", param)

    def check_methods(self, used: Mapping[str, str]) -> None:
        """Of a request, each by its path. Raises: Forbidden."""
        for path, name in used.items():
            if self.methods is not None and name not in self.methods:
                raise Forbidden(f"this key may not use {name}", path)


@dataclass
class View:
    """What a policy shows of what the server has. What it hides is as good as not there, so that whatever looks a name
    up, wherever a request may say it, finds what is allowed and nothing else."""

    policy: Policy
    _of: Capabilities | None = None
    _seen: Capabilities | None = None
    _with: dict[str, Capabilities] = field(default_factory=dict)

    def of(self, caps: Capabilities) -> Capabilities:
        """Made once for each state of the registry."""
        if self._of is not caps or self._seen is None:
            policy = self.policy
            names = policy.presets if policy.forced_preset is None else frozenset((policy.forced_preset,))
            presets = caps.presets if names is None else {k: one for k, one in caps.presets.items() if k in names}
            self._seen, self._of, self._with = replace(caps, presets=presets, limit=self._limit(caps)), caps, {}
            if policy.vectors is not None:
                self._seen = replace(self._seen, registry=caps.registry.only(policy.vectors))
        return self._seen

    def with_preset(self, caps: Capabilities, preset: Preset) -> Capabilities:
        """The same for a request that names a preset, which brings the vectors that it names."""
        seen = self.of(caps)
        if self.policy.vectors is None:
            return seen
        if preset.digest not in self._with:
            named = self.policy.vectors.union(_strings(preset.wire))
            self._with[preset.digest] = replace(seen, registry=caps.registry.only(named))
        return self._with[preset.digest]

    def _limit(self, caps: Capabilities) -> Limit | None:
        """The tighter one."""
        most = self.policy.max_dose
        if most is None or (caps.limit is not None and caps.limit.max_dose <= most):
            return caps.limit
        return Limit(most, "refuse" if caps.limit is None else caps.limit.policy)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)
