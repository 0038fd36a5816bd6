"""The file of keys: hashes, what each may do, and who it is. Read again when it changes; a bad file changes nothing.

    {"keys": [{"id": "team-a", "sha256": ["HEX", ...], "role": "user", "policy": "free"}], "policies": {"free": {...}}}

Several hashes of one key are a rotation: both are valid until the old one is taken out.
"""

import asyncio
import hashlib
import logging
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from whipstaff.server.access.ledger import Ledger, Meter
from whipstaff.server.access.policy import Policy, View
from whipstaff.server.errors import WrongSetup
from whipstaff.server.registry.folder import Stamp, stamp_of

logger = logging.getLogger("vllm.whipstaff")  # below vLLM's logger, so that its format and level apply
PAUSE = 1.0  # seconds between two looks at the file
Digest = Annotated[str, StringConstraints(pattern=re.compile(r"^[0-9a-f]{64}$"))]


class BadKeys(WrongSetup):
    """A file of keys that is wrong."""


class Key(BaseModel):
    """One holder's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="as logs name it")
    sha256: list[Digest] = Field(min_length=1)
    role: Literal["user", "admin"] = "user"
    policy: str | None = None


class KeyFile(BaseModel):
    """All of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: list[Key] = Field(min_length=1)
    policies: dict[str, Policy] = {}

    @model_validator(mode="after")
    def _is_whole(self) -> "KeyFile":
        ids, digests = [key.id for key in self.keys], [digest for key in self.keys for digest in key.sha256]
        for names, what in ((ids, "id"), (digests, "hash")):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"the {what} {twice[0]} is there twice")
        for key in self.keys:
            if key.policy is not None and key.policy not in self.policies:
                raise ValueError(f"key {key.id}: there is no policy {key.policy!r}")
        return self


@dataclass(frozen=True)
class Holder:
    """Who a request comes from."""

    id: str
    is_admin: bool
    policy_name: str | None
    view: View
    meter: Meter

    @property
    def policy(self) -> Policy:
        return self.view.policy


HOLDER: ContextVar[Holder | None] = ContextVar("whipstaff_holder", default=None)
"""Of the request that is answered here; None where there is no file of keys."""


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def read_keys(path: Path) -> KeyFile:
    """Raises: BadKeys."""
    try:
        if path.stat().st_mode & 0o007:
            raise BadKeys(f"{path}: others may read it; chmod 600")
        return KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadKeys(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise BadKeys(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


class Keyring:
    """The file's keys, as one process knows them now. To find a key takes as long for a thousand as for one."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        """Raises: BadKeys."""
        self._path, self._ledger = path, ledger
        self._stamp: Stamp = stamp_of(path)
        self._holders = self._compiled(read_keys(path))

    def find(self, key: str) -> Holder | None:
        """Whose it is. It is hashed before it is looked for, so that time says nothing of how near a guess is."""
        digest = digest_of(key)
        found = self._holders.get(digest)
        return found[1] if found is not None and secrets.compare_digest(found[0], digest) else None

    def reload(self) -> str | None:
        """Read the file again; what is wrong with it, and then the keys are what they were."""
        self._stamp = stamp_of(self._path)
        try:
            self._holders = self._compiled(read_keys(self._path))
        except BadKeys as error:
            return str(error)
        return None

    async def follow(self, note: Callable[[str | None], None]) -> None:
        """Reload when the file changes, for ever; `note` is told how it went."""
        while True:
            await asyncio.sleep(PAUSE)
            if stamp_of(self._path) != self._stamp:
                note(self.reload())

    def _compiled(self, file: KeyFile) -> Mapping[str, tuple[str, Holder]]:
        views = {name: View(policy) for name, policy in file.policies.items()}
        everything, found = View(Policy()), dict[str, tuple[str, Holder]]()
        for key in file.keys:
            view = everything if key.policy is None else views[key.policy]
            meter = Meter.of(self._ledger, key.id, view.policy)
            holder = Holder(key.id, key.role == "admin", key.policy, view, meter)
            found |= {digest: (digest, holder) for digest in key.sha256}
        return found
