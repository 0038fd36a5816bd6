"""Draws a dashboard's panels from Prometheus' answers. It is no Grafana: lines, numbers, tables and heat maps only."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Series = Sequence[Mapping[str, Any]]
HEAD = "Drawn from Prometheus' answers, not by Grafana. {what}."
COLUMN, LINE = 0.72, 0.32  # inches of Grafana's grid
MOST_LINES = 14  # in a legend


def draw(
    panels: Sequence[Mapping[str, Any]], answers: Mapping[tuple[str, str], Series], since: float, to: Path
) -> None:
    """One picture of a dashboard.

    Args:
        answers: by panel's title and query's letter.
        since: where the time axis begins.
    """
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(24 * COLUMN, height * LINE + 0.4), dpi=80)
    figure.text(0.01, 1 - 0.25 / (height * LINE + 0.4), HEAD.format(what="Requests of a test's mix to the demo model"))
    for panel in panels:
        own = [(target, answers[panel["title"], target["refId"]]) for target in panel["targets"]]
        _panel(figure, panel, own, since, height)
    figure.savefig(to)
    plt.close(figure)


def _panel(figure: Any, panel: Mapping[str, Any], own: Sequence[tuple[Any, Series]], since: float, height: int) -> None:
    place, full = panel["gridPos"], height + 0.4 / LINE
    left, bottom = (place["x"] + 1.3) / 24, 1 - (place["y"] + place["h"] + 0.4 / LINE - 1.2) / full
    axes = figure.add_axes((left, bottom, (place["w"] - 1.6) / 24, (place["h"] - 2.9) / full))
    axes.set_title(panel["title"], fontsize=9, loc="left", fontweight="bold")
    axes.tick_params(labelsize=7)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    {"stat": _stat, "table": _table, "heatmap": _heatmap}.get(panel["type"], _lines)(axes, panel, own, since, unit)


def _stat(axes: Any, panel: Any, own: Sequence[tuple[Any, Series]], since: float, unit: str) -> None:
    values = [value for _, series in own for one in series for _, value in one["values"] if not math.isnan(value)]
    axes.axis("off")
    axes.text(0.5, 0.5, _said(values[-1], unit) if values else "No traffic", ha="center", va="center", fontsize=18)


def _said(value: float, unit: str) -> str:
    return f"{100 * value:.3g} %" if unit == "percentunit" else f"{value:.3g} {'s' if unit == 's' else ''}".strip()


def _lines(axes: Any, panel: Any, own: Sequence[tuple[Any, Series]], since: float, unit: str) -> None:
    num = 0
    for target, series in own:
        for one in series:
            times, values = zip(*one["values"], strict=True)
            label = _legend(target["legendFormat"], one["metric"])
            is_goal = label == "goal"
            axes.plot(
                np.array(times) - since,
                np.array(values) * (100 if unit == "percentunit" else 1),
                label=label if num < MOST_LINES else None,
                linewidth=2 if label.startswith("plain") else 1,
                **({"color": "red", "linestyle": "--"} if is_goal else {}),
            )
            num += 1
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_ylabel("%" if unit == "percentunit" else unit, fontsize=7)
    if num:
        axes.legend(fontsize=6, loc="upper left", ncols=2 if num > 5 else 1, framealpha=0.6)


def _legend(form: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        form = form.replace("{{" + name + "}}", value)
    return form


def _heatmap(axes: Any, panel: Any, own: Sequence[tuple[Any, Series]], since: float, unit: str) -> None:
    ((_, series),) = own
    bounds = sorted(series, key=lambda one: float(one["metric"]["le"]))
    times = sorted({time for one in series for time, _ in one["values"]})
    counts = np.array([[dict(one["values"]).get(time, 0.0) for time in times] for one in bounds])
    axes.imshow(np.diff(counts, axis=0, prepend=0), aspect="auto", origin="lower", cmap="Oranges", interpolation="none")
    shown = range(0, len(bounds), 3)
    axes.set_yticks(list(shown), [bounds[index]["metric"]["le"] for index in shown])
    axes.set_xticks([0, len(times) - 1], [f"{times[0] - since:.0f}", f"{times[-1] - since:.0f}"])


def _table(axes: Any, panel: Any, own: Sequence[tuple[Any, Series]], since: float, unit: str) -> None:
    renamed = panel["transformations"][1]["options"]["renameByName"]
    names = [renamed.get(f"Value #{target['refId']}") for target, _ in own]
    keys = sorted({tuple(sorted(one["metric"].items())) for _, series in own for one in series})
    columns = [{tuple(sorted(one["metric"].items())): one["values"][-1][1] for one in series} for _, series in own]
    head = list(dict.fromkeys(name for key in keys for name, _ in key)) + [name for name in names if name]
    rows = [
        [value for _, value in key]
        + [f"{column[key]:.3g}" if key in column else "" for column, name in zip(columns, names, strict=True) if name]
        for key in keys
    ]
    axes.axis("off")
    if rows:
        made = axes.table(cellText=rows, colLabels=head, loc="upper center", cellLoc="left")
        made.auto_set_font_size(False)
        made.set_fontsize(7)
