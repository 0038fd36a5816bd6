"""`whipstaff eval`: a server's answers, plain and steered, over a grid of layers and scales."""

import hashlib
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from tqdm import tqdm

from whipstaff.server.commands.eval_flags import parse
from whipstaff.server.commands.vectors import save
from whipstaff.server.errors import reason_in
from whipstaff.steering.algebra import numbers_of
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.data import Dataset, Item, Split, read_data
from whipstaff.steering.fit.scoring import Difference, Likelihoods, difference, generated, least_kl, multiple_choice
from whipstaff.steering.vector_file import read

_KINDS = ("questions", "choices", "demos", "responses")
_PATIENCE = httpx.Timeout(30, read=600)
_TOP = 20  # log-probabilities that servers give at most, unless told otherwise
_ENOUGH = 20  # rows; below that nothing can be told from noise


class Cell(NamedTuple):
    """One point of the grid; scale 0 without layers is the plain model."""

    layers: tuple[int, ...] | None
    scale: float

    def __str__(self) -> str:
        where = "" if self.layers is None else f"layers {','.join(map(str, self.layers))}, "
        return f"{where}scale {self.scale:g}"


PLAIN = Cell(None, 0.0)


def main(words: list[str]) -> int:
    """The exit status: 0, 2 with the reason on stderr, 130 after an interrupt; --resume then goes on."""
    return run(parse(words))


def run(args: Namespace, transport: httpx.BaseTransport | None = None) -> int:
    """Do what the flags say; the exit status."""
    try:
        with httpx.Client(base_url=args.url, timeout=_PATIENCE, transport=transport) as client:
            return Evaluation(args, client).run()
    except (SteeringError, OSError, httpx.HTTPError) as error:
        print(f"whipstaff eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("whipstaff eval: stopped; --resume goes on where it was", file=sys.stderr)
        return 130


@dataclass(frozen=True)
class Scored:
    """One answer, or one neutral text: the tokens that count, each with its log-probability and the likeliest ones."""

    log_p: tuple[float, ...]
    tops: tuple[dict[str, float], ...]


class Evaluation:
    """One call of `whipstaff eval`."""

    def __init__(self, args: Namespace, client: httpx.Client) -> None:
        self.args, self.client = args, client
        if "{prompt}" not in args.form or not args.form.endswith("{response}"):
            raise SteeringError("--form: wanted {prompt}, and {response} at the end")
        self.data: Dataset = read_data([args.data], _KINDS)
        self.neutral = None if args.neutral is None else read_data([args.neutral], ["neutral"])
        splits: dict[Split, list[Item]] = self.data.split(args.seed)
        self.items = list(self.data.items) if args.part == "all" else splits[args.part]
        if not self.items:
            raise SteeringError(f"{args.data.name}: nothing in the split {args.part}")
        is_choice = self.data.kind in ("questions", "choices")
        self.metric = args.metric or ("mc1" if is_choice else "exact_match")
        self.folder: Path = args.output or Path("eval") / args.vector
        named = [
            Cell(None if layers is None else tuple(layers), scale) for layers in args.layers for scale in args.scales
        ]
        self.cells = list(dict.fromkeys([PLAIN, *(cell for cell in named if cell.scale)]))
        headers = {} if args.api_key is None else {"Authorization": f"Bearer {args.api_key}"}
        client.headers.update(headers)

    # ---- asking

    def run(self) -> int:
        self.model = self._ask("GET", "/v1/models")["data"][0]["id"]
        known = {row["id"]: row["digest"] for row in self._ask("GET", "/v1/steering/vectors")["data"]}
        if self.args.vector not in known:
            raise SteeringError(f"--vector: the server has no {self.args.vector!r}; it has {sorted(known)}")
        done = self._left(known[self.args.vector])
        print(f"{len(self.cells)} cells x {len(self.items)} {self.data.kind}, {len(done)} resumed")
        with (self.folder / "cells.jsonl").open("a") as file, ThreadPoolExecutor(self.args.parallel) as pool:
            for cell in self.cells:
                if str(cell) not in done:
                    done[str(cell)] = self._cell(cell, pool)
                    file.write(json.dumps({"cell": str(cell), **done[str(cell)]}) + "\n")
                    file.flush()
        self._report(done)
        return 0

    def _left(self, digest: str) -> dict[str, dict[str, Any]]:
        """What an earlier run has left, if it asked the same. Raises: SteeringError."""
        said = [
            self.data.digest,
            self.neutral and self.neutral.digest,
            digest,
            self.model,
            self.args.form,
            self.args.match,
        ]
        said += [self.args.max_tokens, self.args.part, self.args.seed]
        key = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        cells, head = self.folder / "cells.jsonl", {"key": key, "data": self.data.names, "vector": digest}
        if not cells.exists() or self.args.force:
            cells.write_text(json.dumps(head) + "\n")
            return {}
        if not self.args.resume:
            raise SteeringError(f"{cells} exists; --resume goes on, --force starts anew")
        lines = [json.loads(line) for line in cells.read_text().splitlines() if line.endswith("}")]
        if not lines or lines[0].get("key") != key:
            raise SteeringError(f"{cells} is of other data, another vector or other flags; --force starts anew")
        cells.write_text("".join(json.dumps(line) + "\n" for line in lines))  # without half a line
        return {line.pop("cell"): line for line in lines[1:]}

    def _cell(self, cell: Cell, pool: ThreadPoolExecutor) -> dict[str, Any]:
        """The scores of every row, and of the neutral texts."""
        rows = self._mapped(pool, str(cell), lambda item: self._scores(item, cell), self.items)
        if self.neutral is None:
            return {"rows": rows}
        texts = self._mapped(pool, f"{cell}, cost", lambda item: self._read(item.row.text, cell), self.neutral.items)
        return {"rows": rows, "neutral": [{"log_p": each.log_p, "tops": each.tops} for each in texts]}

    def _mapped(
        self, pool: ThreadPoolExecutor, what: str, ask: Callable[[Item], Any], items: Sequence[Item]
    ) -> list[Any]:
        return list(tqdm(pool.map(ask, items), total=len(items), desc=what, disable=None, leave=False))

    def _steering(self, cell: Cell, where: Any = None) -> dict[str, Any]:
        if cell == PLAIN:
            return {}
        entry: dict[str, Any] = {"vector": self.args.vector, "scale": cell.scale}
        if cell.layers is not None:
            entry["layers"] = list(cell.layers)
        return {"steering": entry if where is None else entry | {"where": where}}

    def _scores(self, item: Item, cell: Cell) -> dict[str, float]:
        row = item.row
        if self.data.kind == "questions":
            best = row.best if row.best in row.right else row.right[0]
            answers = (*row.right, *row.wrong)
            return self._choice(row.asked, answers, range(len(row.right)), answers.index(best), cell)
        if self.data.kind == "choices":
            return self._choice(_text(item, row.prompt), row.choices, row.answers, row.answers[0], cell)
        prompt, wanted = (
            (row.input, row.output) if self.data.kind == "demos" else (_text(item, row.prompt), row.response)
        )
        before = self._before(prompt).rstrip(" ")
        body = {"prompt": before, "max_tokens": self.args.max_tokens, "temperature": 0, "stop": ["\n"]}
        said = self._complete(body | self._steering(cell))["text"]
        return generated(said, wanted, self.args.match)

    def _choice(
        self, prompt: str, answers: Sequence[str], right: Sequence[int], best: int, cell: Cell
    ) -> dict[str, float]:
        log_p = tuple(sum(self._answer(prompt, answer, cell)) for answer in answers)
        return multiple_choice(Likelihoods(log_p, tuple(map(len, answers)), tuple(right), best))

    def _before(self, prompt: str) -> str:
        return str(self.args.form.removesuffix("{response}").replace("{prompt}", prompt))

    def _answer(self, prompt: str, answer: str, cell: Cell) -> tuple[float, ...]:
        """Log-probabilities of an answer's tokens, edited from the row before its first on, as generation would be."""
        text = self._before(prompt) + answer
        found = self._echo(text, PLAIN, None)
        num = _tokens_at_end(found["tokens"], len(answer))
        if cell != PLAIN:
            found = self._echo(text, cell, {"prompt": [[-(num + 1), None]]})
        return tuple(found["token_logprobs"][-num:])

    def _read(self, text: str, cell: Cell) -> Scored:
        found = self._echo(text, cell, "all", _TOP)
        return Scored(tuple(found["token_logprobs"][1:]), tuple(found["top_logprobs"][1:]))

    def _echo(self, text: str, cell: Cell, where: Any, top: int = 0) -> dict[str, Any]:
        body = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": top, "temperature": 0}
        found: dict[str, Any] = self._complete(body | self._steering(cell, where))["logprobs"]
        return found

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("POST", "/v1/completions", {"model": self.model, **body})["choices"][0]
        return found

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.client.request(method, path, json=body)
        if answer.is_success:
            return answer.json()
        raise SteeringError(f"{self.args.url} answers {answer.status_code}: {reason_in(answer.text)}")

    # ---- telling

    def _report(self, done: dict[str, dict[str, Any]]) -> None:
        plain = done[str(PLAIN)]
        groups = [item.row.group or item.row.own_group for item in self.items]
        if self.metric not in plain["rows"][0]:
            raise SteeringError(f"--metric: {self.metric!r} is none of {sorted(plain['rows'][0])}")
        before = [row[self.metric] for row in plain["rows"]]
        lines: list[dict[str, Any]] = []
        print(f"{self.metric} on {self.args.part}, plain: {_mean(before):.3f}")
        print(
            f"  {'cell':<28} {self.metric:>11}  difference from plain             "
            + ("   KL at least   perplexity" if self.neutral else "")
        )
        for cell in self.cells:
            rows = done[str(cell)]["rows"]
            now = [row[self.metric] for row in rows]
            found = difference(before, now, groups, self.args.seed)
            cost = self._cost(plain, done[str(cell)])
            means = {name: round(_mean([row[name] for row in rows]), 4) for name in rows[0]}
            lines.append({"cell": str(cell), "layers": cell.layers, "scale": cell.scale, "means": means, **cost})
            lines[-1]["difference"] = {key: round(value, 4) for key, value in found._asdict().items()}
            lines[-1]["changed"] = sum(a != b for a, b in zip(plain["rows"], rows, strict=True))
            said = "" if cell == PLAIN else _said(found)
            costs = f"   {cost['kl']:>11.4f}   x{cost['perplexity_ratio']:.3f}" if cost else ""
            print(f"  {cell!s:<28} {_mean(now):>11.3f}  {said:<34}{costs}")
        _warn(lines, len(set(groups)))
        chosen = self._chosen(lines)
        (self.folder / "summary.json").write_text(
            json.dumps({"metric": self.metric, "cells": lines, "chosen": chosen}, indent=1)
        )
        _plot(lines, self.metric, self.folder / "dose.png")
        print(f"wrote {self.folder}/cells.jsonl, summary.json, dose.png")

    def _cost(self, plain: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
        if self.neutral is None:
            return {}
        tokens = [
            (least_kl(p, q), b - a)
            for one, two in zip(plain["neutral"], other["neutral"], strict=True)
            for p, q, a, b in zip(one["tops"], two["tops"], two["log_p"], one["log_p"], strict=True)
        ]
        kl, lost = (_mean([each[index] for each in tokens]) for index in (0, 1))
        return {"kl": round(kl, 5), "perplexity_ratio": round(math.exp(min(lost, 50.0)), 4)}

    def _chosen(self, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The smallest scale within one standard error of the best that keeps to the cost, written into the file."""
        target = self.args.choose
        if target is None:
            return None
        if self.neutral is None:
            raise SteeringError("--choose: say what it may cost, on --neutral texts")
        able = [line for line in lines if line["kl"] <= self.args.max_kl]
        best = max(able, key=lambda line: line["means"][self.metric])
        error = (best["difference"]["high"] - best["difference"]["low"]) / 3.92
        near = [line for line in able if line["means"][self.metric] >= best["means"][self.metric] - error]
        chosen = min(near, key=lambda line: abs(line["scale"]))
        if not chosen["scale"]:
            print("chosen: none; no cell that keeps to the cost is better than plain by more than one standard error")
            return chosen
        vector = read(target)
        header = vector.header.model_copy(update={"scale": chosen["scale"]})
        save(target, header, numbers_of(vector), force=True)
        print(f"chosen: {chosen['cell']}; it is the default scale of {target} now. Look once at --part test")
        return chosen


def _text(item: Item, prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise SteeringError(f"{item.place}: prompts are texts here, not messages")
    return prompt


def _tokens_at_end(tokens: Sequence[str], characters: int) -> int:
    """How many of the last tokens hold the last so many characters."""
    held, num = 0, 0
    while held < characters and num < len(tokens) - 1:
        num += 1
        held += len(tokens[-num])
    return num


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _said(found: Difference) -> str:
    noise = "  noise" if found.is_noise else ""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{noise}"


def _warn(lines: Sequence[dict[str, Any]], num_groups: int) -> None:
    steered = [line for line in lines if line["scale"]]
    if num_groups < _ENOUGH:
        print(f"warning: {num_groups} questions; below {_ENOUGH} an interval means little")
    for text in _warnings(steered):
        print(f"warning: {text}")


def _warnings(steered: Sequence[dict[str, Any]]) -> Iterator[str]:
    if steered and not any(line["changed"] for line in steered):
        yield "no cell changed any score: the edit did not reach what was scored"
    elif steered and all(line["difference"]["low"] <= 0 <= line["difference"]["high"] for line in steered):
        yield "no effect beyond noise: every interval holds 0"
    if len(steered) > 5:
        yield f"the best of {len(steered)} cells looks better than it is: choose on --part dev, report --part test"


def _plot(lines: Sequence[dict[str, Any]], metric: str, path: Path) -> None:
    """Effect and cost by scale, a line for each set of layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    effect = figure.add_subplot()
    cost = effect.twinx() if "kl" in lines[0] else None
    plain = lines[0]
    for layers in dict.fromkeys(line["layers"] for line in lines[1:]):
        some = sorted(
            [plain, *(line for line in lines[1:] if line["layers"] == layers)], key=lambda line: line["scale"]
        )
        x = [line["scale"] for line in some]
        y = [plain["means"][metric] + line["difference"]["mean"] for line in some]
        low, high = (
            [abs(line["difference"]["mean"] - line["difference"][end]) for line in some] for end in ("low", "high")
        )
        effect.errorbar(
            x, y, [low, high], marker="o", capsize=2, label="all layers" if layers is None else f"layers {layers}"
        )
        if cost is not None:
            cost.plot(x, [line["kl"] for line in some], linestyle=":", marker="x")
            cost.set_ylabel("KL to the plain model, nats a token (dotted)")
    effect.axhline(plain["means"][metric], color="grey", linewidth=0.8)
    effect.set_xlabel("scale")
    effect.set_ylabel(metric)
    effect.legend(loc="upper left") if len(lines) > 1 else None
    figure.savefig(path, dpi=120)
