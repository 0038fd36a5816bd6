"""What is checked before a commit is what `make check` checks, and the editors' settings can be read."""

import re
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_a_commit_is_checked_as_make_checks() -> None:
    (rule,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local" and all(hook["language"] == "system" for hook in local["hooks"])
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in rule.splitlines()]
    assert [hook["entry"] for hook in local["hooks"]] == commands


def test_editors_keep_the_line_length_of_ruff() -> None:
    settings = ConfigParser()
    settings.read_string("[top]\n" + (ROOT / ".editorconfig").read_text())
    lengths = {section["max_line_length"] for section in settings.values() if "max_line_length" in section}
    (length,) = re.findall(r"^line-length = (\d+)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert lengths == {length}
