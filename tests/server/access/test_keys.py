"""The file of keys: what is wrong with one is said with its place, and a bad one never replaces a good one."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from whipstaff.server.access import keys
from whipstaff.server.access.keys import BadKeys, Keyring, digest_of, read_keys
from whipstaff.server.access.ledger import Ledger


def write(path: Path, *held: dict[str, Any], policies: Any = None, mode: int = 0o600) -> Path:
    path.write_text(json.dumps({"keys": held, **({} if policies is None else {"policies": policies})}))
    path.chmod(mode)
    return path


def key(name: str, *said: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "sha256": [digest_of(one) for one in said]} | more


@pytest.mark.parametrize(
    ("held", "policies", "reason"),
    [
        ([], None, "keys: List should have at least 1 item"),
        ([key("a b", "x")], None, "keys.0.id: String should match"),
        ([key("a")], None, "keys.0.sha256: List should have at least 1"),
        ([key("a", "x") | {"sha256": ["secret"]}], None, "keys.0.sha256.0: String should match"),
        ([key("a", "x"), key("a", "y")], None, "the id a is there twice"),
        ([key("a", "x"), key("b", "x")], None, "is there twice"),
        ([key("a", "x", policy="p")], {}, "key a: there is no policy 'p'"),
        ([key("a", "x", role="root")], None, "keys.0.role: Input should be 'user' or 'admin'"),
        ([key("a", "x", rights=1)], None, "keys.0.rights: Extra inputs are not permitted"),
        ([key("a", "x")], {"p": {"methods": ["magic"]}}, "policies.p.methods: Value error, 'magic' is no method"),
        ([key("a", "x")], {"p": {"per_minute": {"requests": 0}}}, "policies.p.per_minute.requests: Input should be"),
        ([key("a", "x")], {"p": {"max_dose": "NaN"}}, "policies.p.max_dose: Input should be"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, held: Any, policies: Any, reason: str) -> None:
    with pytest.raises(BadKeys) as wrong:
        read_keys(write(tmp_path / "keys.json", *held, policies=policies))
    assert reason in str(wrong.value) and "secret" not in str(wrong.value) and "\n" not in str(wrong.value)


def test_files_that_cannot_be_read_or_that_others_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadKeys, match="No such file"):
        read_keys(tmp_path / "none.json")
    with pytest.raises(BadKeys, match="chmod 600"):
        read_keys(write(tmp_path / "keys.json", key("a", "x"), mode=0o644))


def test_several_keys_are_valid_at_once_and_each_is_its_holders(tmp_path: Path) -> None:
    path = write(
        tmp_path / "keys.json",
        key("a", "old", "new", policy="p"),
        key("root", "r", role="admin"),
        policies={"p": {"n": 2}},
    )
    ring = Keyring(path, Ledger.of_one())
    found = [ring.find("old"), ring.find("new")]
    assert [one and one.id for one in found] == ["a", "a"]
    assert found[0] is not None and found[0].policy.n == 2 and not found[0].is_admin
    root = ring.find("r")
    assert root is not None and root.is_admin and root.meter.is_free
    for wrong in ("", "ol", "old ", "OLD", digest_of("old"), "\udcff"):
        assert ring.find(wrong) is None


def test_a_changed_file_is_read_and_a_bad_one_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "PAUSE", 0.01)
    path = write(tmp_path / "keys.json", key("a", "old"))
    ring, told = Keyring(path, Ledger.of_one()), list[str | None]()

    async def follow() -> None:
        following = asyncio.create_task(ring.follow(told.append))
        for change in (
            lambda new: write(new, key("a", "old", "new")),
            lambda new: write(new, key("a", "new")),
            lambda new: (new.write_text("{"), new.chmod(0o600)),
        ):
            seen = len(told)
            change(tmp_path / "next.json")
            os.replace(tmp_path / "next.json", path)
            async with asyncio.timeout(20):
                while len(told) == seen:
                    await asyncio.sleep(0.01)
            now.append([ring.find(one) is not None for one in ("old", "new")])
        following.cancel()

    now: list[list[bool]] = []
    asyncio.run(follow())
    assert now == [[True, True], [False, True], [False, True]]
    assert told[:2] == [None, None] and "keys.json" in str(told[2])
