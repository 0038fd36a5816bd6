"""The picture that `whipstaff bench --png` draws; it alone needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from whipstaff.server.engine.bench import Answer


def draw(answers: Mapping[str, Sequence[Answer]], path: Path) -> None:
    """Which share of each method's requests, or of their tokens, took no longer than that."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for name, mine in answers.items():
        good = [one for one in mine if not one.error]
        times = [
            [one.ttft for one in good if one.ttft],
            [gap for one in good for gap in one.itls],
            [one.e2e for one in good],
        ]
        for axis, seconds in zip(axes, times, strict=True):
            if seconds:
                axis.ecdf([1e3 * each for each in seconds], label=name)
    for axis, title in zip(axes, ("time to first token", "time between tokens", "whole answer"), strict=True):
        axis.set_xlabel(f"{title} (ms)")
        axis.set_xscale("log")
        axis.tick_params(axis="x", which="minor", labelsize=6)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share that took no longer")
    axes[2].legend(loc="lower right")
    figure.savefig(path, dpi=100)
