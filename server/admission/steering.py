"""The entries of a request's `steering`, resolved, and what the receipt says of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from whipstaff.server.admission.positions import SoftPrompt
from whipstaff.server.errors import BadRequest
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fed import Fed
from whipstaff.steering.kinds.kind import Entry
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.vector_file import Vector


@dataclass(frozen=True, kw_only=True)
class Steered(Entry):
    """One entry of a request's `steering`, resolved."""

    path: str
    is_off: bool = False  # whether it changes nothing and is left out

    @staticmethod
    def at(path: str, entry: Entry, is_off: bool = False) -> "Steered":
        """An entry, and where in the request it stands."""
        return Steered(**vars(entry), path=path, is_off=is_off)

    @property
    def label(self) -> str:
        """Its method's name: one of ours, or the general one for files of other methods."""
        return self.vector.method.name

    @property
    def soft(self) -> SoftPrompt | None:
        """The placeholders that it asks for."""
        return self.inserted and SoftPrompt(self.path, self.vector.digest, *self.inserted)

    def check_prompt(self, plan: SteeringPlan, prompt_len: int, caps: Capabilities) -> None:
        """Checks that need the prompt's length. Raises: BadRequest naming the field."""
        try:
            self.vector.method.kind.check_prompt(self, plan, prompt_len, caps)
        except SteeringError as error:
            raise BadRequest(str(error), f"{self.path}.{error.param}") from None

    def said(self, plan: SteeringPlan, fed: list[Fed], caps: Capabilities) -> dict[str, Any]:
        """The entry as the receipt shows it; `fed` are the finished sequences."""
        return {
            "vector": self.params.vector,
            "digest": self.vector.digest,
            "method": self.vector.header.method,
            **self.vector.method.kind.describe(self, plan, fed, caps),
        }


class SequenceSteering(NamedTuple):
    """How a sequence is steered, whatever its prompt will be: the request's own, or a companion's."""

    entries: Sequence[Steered] = ()
    plan: SteeringPlan = SteeringPlan(())
    warnings: Sequence[str] = ()  # for the receipt

    @property
    def paths(self) -> list[str]:
        """Where in the request each edit of the plan stands, then each special."""
        paths = [entry.path for entry in self.entries for _ in entry.edits]
        return paths + [entry.path for entry in self.entries if entry.module_edit is not None]

    @property
    def soft(self) -> list[SoftPrompt]:
        """The rows that a prompt must have room for; a KV prefix stands first."""
        prefix_first = sorted(self.entries, key=lambda entry: entry.module_edit is None)
        return [entry.soft for entry in prefix_first if entry.soft is not None]

    @property
    def vectors(self) -> list[Vector]:
        """The files that it reads."""
        return [vector for entry in self.entries for vector in (entry.vector, entry.probe) if vector is not None]


def check_one_set(entries: Iterable[Steered], plan: SteeringPlan) -> None:
    """The engine tells apart one set of tokens per sequence. Raises: BadRequest."""
    first: frozenset[int] = frozenset()
    for entry in entries:
        for planned in entry.planned(plan):
            where = planned.where
            for name, region in (("tokens", where), ("exclude.tokens", where.exclude)):
                ids = region.ids if region else frozenset()
                first = first or ids
                if ids and ids != first:
                    raise BadRequest(
                        f"a request may tell one set of tokens apart; these are {sorted(ids)}, and before them "
                        f"came {sorted(first)}",
                        f"{entry.path}.where.{name}",
                    )
