"""The embedded demo: three tiny language models of one invented world, and vectors for the largest of them."""

from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent / "models"  # demo (base), untuned (anti-expert), tuned (expert): Hugging Face folders
VECTORS = Path(__file__).parent / "vectors"  # cheerful, by train.py; the others by fitted.py
PRESETS = Path(__file__).parent / "presets"  # demo@gloomy, demo@helpful
MIX = Path(__file__).parent / "mix.yaml"  # what `whipstaff bench` asks them
# vLLM's engine arguments. The demo is small: no need for vLLM's share of all memory, nor for the minute that
# compilation takes.
ENGINE: dict[str, Any] = {
    "served_model_name": "demo",
    "dtype": "float32",
    "max_model_len": 1024,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 28,
}
# Ours. It is there to be tried, so it serves what others serve where a flag asks for it.
SETTINGS: dict[str, Any] = {
    "lookahead": True,
    "attention_rows": True,
    "attention_layers": "all",
    "hidden_states": 8,
    "steering_sites": "attention",
}
