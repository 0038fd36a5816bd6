"""`whipstaff keys` says of a key what a file of keys holds of it."""

import io
import json
from pathlib import Path

import pytest

from whipstaff.server.access.keys import Keyring
from whipstaff.server.access.ledger import Ledger
from whipstaff.server.commands import keys


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.mark.parametrize("command", ["hash", "new"])
def test_what_it_prints_opens_a_server_for_the_key(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "my key\r\nmore\n")
    assert keys.main([command]) == 0
    said = capsys.readouterr()
    key, path = said.err.strip() or "my key", tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"id": "a", "sha256": said.out.split()}]}))
    path.chmod(0o600)
    ring = Keyring(path, Ledger.of_one())
    assert ring.find(key) is not None and ring.find(said.out.strip()) is None
    assert command == "hash" or len(key) >= 32


def test_new_keys_are_all_different(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        assert keys.main(["new"]) == 0
    assert len({*capsys.readouterr().err.split()}) == 3


@pytest.mark.parametrize("text", ["", "\n", " key\n", "key \n", "a\0b\n"])
def test_what_no_client_could_send_is_no_key(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, text)
    assert keys.main(["hash"]) == 1
    assert not capsys.readouterr().out


def test_a_wrong_call_ends_with_2() -> None:
    for words in ([], ["list"], ["hash", "my-key"]):  # what stands in a command line, everybody sees
        with pytest.raises(SystemExit) as exit_:
            keys.main(words)
        assert exit_.value.code == 2
