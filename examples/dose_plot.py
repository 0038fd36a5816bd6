"""Effect against dose: how a vector's scale moves the log-odds of two endings of one sentence, as a picture.

Each scale is one request that generates nothing: it echoes prompt and ending, steered, and asks for log-probabilities.
"""

import argparse
from typing import Any, NamedTuple

import httpx
from PIL import Image, ImageDraw

PROMPT = "In the morning Mara opened the door, and"
ENDINGS = (" a rainbow stood over the fields.", " a black cloud carried the smell of smoke.")
SCALES = (-12, -8, -6, -4, -2, 0, 2, 4, 6, 8, 12)
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 400, 64, 40, 600, 340  # of the picture, and of the axes in it
INK, LINE, GRID, PAPER = (31, 41, 51), (192, 57, 43), (217, 226, 236), (255, 255, 255)


class Point(NamedTuple):
    scale: float
    log_odds: float  # of the first ending over the second
    dose: float  # the largest edit's length beside the activations that it edits


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--url", default="http://localhost:8000")
    flags.add_argument("--model", default="demo")
    flags.add_argument("--key", default="none")
    flags.add_argument("--vector", default="cheerful")
    flags.add_argument("--out", default="dose.png")
    args = flags.parse_args()
    with httpx.Client(base_url=args.url, headers={"Authorization": f"Bearer {args.key}"}, timeout=120) as http:
        points = [measured(http, args.model, args.vector, scale) for scale in SCALES]
    for point in points:
        print(f"scale {point.scale:+5g}   dose {point.dose:5.2f}   log-odds {point.log_odds:+7.2f}")
    drawn(args.vector, points).save(args.out)
    print(args.out)


def measured(http: httpx.Client, model: str, vector: str, scale: float) -> Point:
    """Both endings in one batch. `where` is `all`: by default the prompt before its last token is left alone, and here
    the endings are part of the prompt."""
    steering = {"vector": vector, "scale": scale, "where": "all"}
    body = {"model": model, "prompt": [PROMPT + ending for ending in ENDINGS], "steering": steering}
    answer = http.post("/v1/completions", json=body | {"max_tokens": 0, "echo": True, "logprobs": 0})
    answer.raise_for_status()
    said = answer.json()
    first, second = (log_probability(choice["logprobs"]) for choice in said["choices"])
    doses = [entry["dose"]["relative"] for entry in said["whipstaff"]["steering"] if entry.get("dose")]
    return Point(scale, first - second, max(doses, default=0.0))


def log_probability(scored: dict[str, Any]) -> float:
    """Of what follows the prompt."""
    tokens = zip(scored["text_offset"], scored["token_logprobs"], strict=True)
    return float(sum(logprob for offset, logprob in tokens if offset >= len(PROMPT)))


def drawn(vector: str, points: list[Point]) -> Image.Image:
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(picture)
    most = max(abs(point.log_odds) for point in points) or 1.0
    widest = max(abs(point.scale) for point in points)

    def at(scale: float, log_odds: float) -> tuple[float, float]:
        return (
            LEFT + (RIGHT - LEFT) * (scale + widest) / (2 * widest),
            BOTTOM - (BOTTOM - TOP) * (log_odds + most) / (2 * most),
        )

    draw.text((LEFT, 12), f'log-odds of "{ENDINGS[0].strip()}" over "{ENDINGS[1].strip()}"', INK)
    for point in points:
        x, _ = at(point.scale, 0)
        draw.line((x, TOP, x, BOTTOM), GRID)
        draw.text((x - 10, BOTTOM + 8), f"{point.scale:+g}", INK)
        draw.text((x - 10, BOTTOM + 22), f"{point.dose:.2f}", LINE)
    for level in (-most, 0.0, most):
        _, y = at(0, level)
        draw.line((LEFT, y, RIGHT, y), GRID)
        draw.text((8, y - 6), f"{level:+.1f}", INK)
    draw.text((LEFT, HEIGHT - 18), f"scale of {vector!r}, and below it the dose beside the activations", INK)
    path = [at(point.scale, point.log_odds) for point in points]
    draw.line(path, LINE, width=2)
    for x, y in path:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), LINE)
    return picture


if __name__ == "__main__":
    main()
