"""Shared settings of the tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may look for a model hub
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
