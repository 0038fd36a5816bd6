"""How long those tests go on that wait for something rare: WHIPSTAFF_SOAK=1 makes it a night's work."""

import os

SOAK = os.environ.get("WHIPSTAFF_SOAK") == "1"


def tries(night: int) -> int:
    """How many a property is tried with whose examples cost most: others in every run, a night's number at night."""
    return night if SOAK else night // 4
