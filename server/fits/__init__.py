"""Fits over HTTP: vectors made of what the serving engine's own model reads, beside its traffic."""
