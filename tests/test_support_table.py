"""The table of docs/models.md is of the versions that are installed, and says what a few architectures show."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAMPLE = ("LlamaForCausalLM", "DeepseekV3ForCausalLM", "JambaForCausalLM", "LongcatFlashForCausalLM")


def test_it_is_current() -> None:
    """Run `make support` where this fails."""
    command = [sys.executable, str(ROOT / "docs" / "support.py"), "--check", *SAMPLE]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
