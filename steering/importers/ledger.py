"""Accounts of what foreign files hold: nothing in them may be passed over in silence.

A `Ledger` is the fields or tensors of one file. What an importer asks for by its name is used; what it calls harmless
is known and changes no number; all else is left over, and refused by name when the importer is done. So an importer
cannot forget a field that turns an addition into a projection: what it does not know of is refused, whatever it is.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Self

from torch import Tensor

from whipstaff.steering.errors import SteeringError

MAX_NAMED = 8  # in one message


class Ledger(Mapping[Any, Any]):
    """A mapping that keeps book: `[]`, `get`, `items` and `values` use an entry; `in`, `len` and iteration only look.

    An entry that is a mapping itself is a ledger too, so that using it does not use what is in it.
    """

    def __init__(self, file: str, content: Mapping[Any, Any], prefix: str = "") -> None:
        self.file = file
        self._content, self._prefix = content, prefix
        self._used: set[Any] = set()
        self._harmless: list[str] = []
        self._inner: dict[Any, Ledger] = {}

    def __getitem__(self, key: Any) -> Any:
        value = self._content[key]
        self._used.add(key)
        if not isinstance(value, Mapping):
            return value
        return self._inner.setdefault(key, Ledger(self.file, value, f"{self._prefix}{key}."))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __str__(self) -> str:
        return str(self._content)

    def peek(self, key: Any) -> Any:
        """An entry, which is not used by that."""
        return self._content[key]

    def fresh(self) -> Self:
        """The same entries, none of them used yet."""
        return type(self)(self.file, self._content)

    def section(self, name: str) -> "Ledger":
        """An entry that is a mapping; an empty ledger where there is none. Raises: SteeringError."""
        found = self.get(name)
        if found is None:
            return Ledger(self.file, {}, f"{self._prefix}{name}.")
        if not isinstance(found, Ledger):
            raise SteeringError(f"{name} of {self.file} is no JSON object")
        return found

    def harmless(self, *names: str) -> None:
        """Entries that change no number; `*` stands for any letters."""
        self._harmless += names

    def left(self) -> Iterator[tuple[str, Any]]:
        """What is not accounted for: names, and what they hold. An entry that is null or empty says nothing."""
        for key in self._content:
            if key in self._inner:
                yield from self._inner[key].left()
            elif key not in self._used and not matches(str(key), self._harmless):
                value = self._content[key]
                if not _is_empty(value):
                    yield f"{self._prefix}{key}", value


def settle(ledgers: Iterable[Ledger], ignored: str | None) -> list[str]:
    """That all is accounted for, but for what a user said to ignore: the names of that, for the vector's notes.

    Raises:
        SteeringError: something is left over, or there is nothing of the names that are to be ignored.
    """
    patterns = [name.strip() for name in (ignored or "").split(",") if name.strip()]
    unused, passed = set(patterns), []
    for ledger in ledgers:
        left: list[tuple[str, Any]] = []
        for name, value in ledger.left():
            hits = {pattern for pattern in patterns if matches(name, [pattern])}
            unused -= hits
            if hits:
                passed.append(name)
            else:
                left.append((name[:128], value))
        if left:
            raise SteeringError(_refusal(ledger.file, left), "ignore")
    if unused:
        raise SteeringError(f"nothing named {min(unused)!r} is left over in the file", "ignore")
    return passed


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _refusal(file: str, left: Sequence[tuple[str, Any]]) -> str:
    said = ", ".join(f"{name} ({_described(value)})" for name, value in left[:MAX_NAMED])
    more = f" and {len(left) - MAX_NAMED} more" if len(left) > MAX_NAMED else ""
    return (
        f"{file} also holds {said}{more}, which this format is not known to have. It may change what the numbers mean, "
        f"so the file is refused; if it does not, say ignore={','.join(name for name, _ in left[:MAX_NAMED])}"
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping | list | str) and not value)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    try:
        return json.dumps(value)[:64]
    except (TypeError, ValueError):
        return type(value).__name__
