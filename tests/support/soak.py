"""How long those tests go on that wait for something rare: WHIPSTAFF_SOAK=1 makes it a night's work."""

import os

SOAK = os.environ.get("WHIPSTAFF_SOAK") == "1"
