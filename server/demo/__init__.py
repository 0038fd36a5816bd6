"""The embedded demo: three tiny language models of one invented world, and vectors for the largest of them."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"  # demo (base), untuned (anti-expert), tuned (expert): Hugging Face folders
VECTORS = Path(__file__).parent / "vectors"  # cheerful, by train.py; the others by fitted.py
PRESETS = Path(__file__).parent / "presets"  # demo@gloomy, demo@helpful
MIX = Path(__file__).parent / "mix.yaml"  # what `whipstaff bench` asks them
