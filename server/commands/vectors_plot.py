"""A vector file as a picture: norms per layer, norms per head, cosines between layers."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from whipstaff.server.commands.vectors import cosines, groups
from whipstaff.steering.vector_file import Vector

CELL, LEFT, GAP, BAR = 18, 60, 40, 300
INK, PAPER = (30, 30, 30), (255, 255, 255)
_LOW, _ZERO, _HIGH = (40, 90, 180), (245, 245, 245), (190, 40, 40)


def plot(name: str, vector: Vector) -> Image.Image:
    """Panels one below the other, for every site and part."""
    panels = [_title(name, vector)]
    for group, rows in groups(vector).items():
        labels = list(map(str, rows))
        norms = torch.stack([row.double().norm() for row in rows.values()])
        panels.append(_bars(f"norms per layer of {group}", labels, norms))
        if group.startswith("attn_head.") and next(iter(rows.values())).ndim == 2:
            heads = torch.stack([row.double().norm(dim=1) for row in rows.values()])
            most = heads.max().clamp_min(1e-30)
            panels.append(_heat(f"norms per head of {group}, most {most:.3g}", labels, heads / most))
        if len(rows) > 1:
            panels.append(_heat(f"cosines of {group}, -1 blue to 1 red", labels, cosines(rows)))
    picture = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), PAPER)
    top = 0
    for panel in panels:
        picture.paste(panel, (0, top))
        top += panel.height
    return picture


def _title(name: str, vector: Vector) -> Image.Image:
    panel = Image.new("RGB", (LEFT + BAR + 120, 30), PAPER)
    ImageDraw.Draw(panel).text((8, 8), f"{name}: {vector.header.method}".encode("latin-1", "replace"), INK)
    return panel


def _bars(title: str, labels: list[str], values: Tensor) -> Image.Image:
    panel, draw = _panel(title, LEFT + BAR + 120, len(labels), labels)
    most = float(values.max().clamp_min(1e-30))
    for row, value in enumerate(values.tolist()):
        top = GAP + row * CELL
        draw.rectangle((LEFT, top + 3, LEFT + int(BAR * value / most), top + CELL - 4), fill=_HIGH)
        draw.text((LEFT + BAR + 8, top + 3), f"{value:.4g}", INK)
    return panel


def _heat(title: str, labels: list[str], values: Tensor) -> Image.Image:
    num_rows, num_columns = values.shape
    panel, draw = _panel(title, max(LEFT + num_columns * CELL + 20, LEFT + BAR + 120), num_rows, labels)
    for row, line in enumerate(values.clamp(-1, 1).tolist()):
        for column, value in enumerate(line):
            left, top = LEFT + column * CELL, GAP + row * CELL
            draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=_colour(value))
    return panel


def _panel(title: str, width: int, num_rows: int, labels: list[str]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    panel = Image.new("RGB", (width, GAP + num_rows * CELL + 16), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((8, 16), title, INK)
    for row, label in enumerate(labels):
        draw.text((24, GAP + row * CELL + 3), label, INK)
    return panel, draw


def _colour(value: float) -> tuple[int, int, int]:
    end = _HIGH if value > 0 else _LOW
    red, green, blue = (round(zero + abs(value) * (to - zero)) for zero, to in zip(_ZERO, end, strict=True))
    return red, green, blue
