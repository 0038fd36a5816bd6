"""What tests of decoding methods share: rows of a batch with everything that a method may read, and goldens."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from whipstaff.decoding.method import Content, DecodingError, Depth, LogitsRewriter, Method, Params, StreamMixer
from whipstaff.decoding.mix import Mix, MixedRow, mix_rows
from whipstaff.decoding.rows import Rows
from whipstaff.steering.methods import METHODS as FILES

VOCAB, HIDDEN, WIDTH = 40, 8, 24
MEMBERS = 3  # further sequences that a row has
AUXILIARIES = ("first", "second")
GOLDEN = Path(__file__).parents[1] / "golden" / "decoding"
SIZES = {"vocab": VOCAB, "hidden": HIDDEN, "inner": 12, "choices": 4, "2": 2}


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a golden file says, and its tensors."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


class StubVocabulary:
    """A vocabulary whose token v is the letter of that number; 2 ends a text."""

    eos = (2,)
    num_tokens = VOCAB

    def __init__(self, texts: Mapping[str, int] | None = None) -> None:
        self._texts = {chr(97 + v): v for v in range(VOCAB)} if texts is None else dict(texts)

    def id_of(self, text: str) -> int | None:
        return self._texts.get(text)

    def ids_with(self, text: str) -> Sequence[int]:
        return [token for mine, token in self._texts.items() if text in mine]

    def encode(self, text: str) -> Sequence[int]:
        return [self._texts[letter] for letter in text if letter in self._texts]


class StubSource:
    """A prompt of letters, each a token; 0 begins what stands alone."""

    def __init__(self, text: str = "abcde") -> None:
        self.text, self.ids = text, StubVocabulary().encode(text)

    def encode(self, content: Content, param: str) -> Sequence[int]:
        if isinstance(content, str):
            return StubVocabulary().encode(content)
        return [token if isinstance(token, int) else len(token.content) for token in content]

    def changed(self, text: str) -> Sequence[int]:
        return self.encode(text, "")

    def alone(self, text: str) -> Sequence[int]:
        return [0, *self.encode(text, "")]

    def without(self, span: str, param: str) -> Sequence[int]:
        return self.encode(self.text.replace(span, "", 1), param)

    def as_chat(self, param: str) -> Sequence[int]:
        return [1, *self.ids]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + token) for token in ids)


@dataclass
class StubPrompt:
    num_tokens: int = 5
    user: int = 2

    def last_user(self) -> int:
        return self.user

    def text_at(self, text: str, param: str) -> tuple[int, int]:
        """Of a prompt "abcde", each letter a token."""
        start = "abcde".find(text)
        if start < 0:
            raise DecodingError("this text does not stand in the prompt", param)
        return start, start + len(text)

    def messages_at(self, role: str | None, index: int | None, param: str) -> Sequence[tuple[int, int]]:
        """Of a system's message "a" and a user's "cd"."""
        found = [span for who, span in (("system", (0, 1)), ("user", (2, 4))) if role in (None, who)]
        chosen = found if index is None else found[index:][:1]
        if not chosen:
            raise DecodingError("no message matches", param)
        return chosen

    def images_at(self, index: int | None, param: str) -> Sequence[tuple[int, int]]:
        """Of two: the second has a token in its midst that is none of its own."""
        images = [[(1, 2)], [(2, 3), (4, 5)]]
        if index is not None and not -2 <= index < 2:
            raise DecodingError("the prompt has 2 images", param)
        return [span for image in (images if index is None else [images[index]]) for span in image]


@dataclass
class Batch:
    """Rows of requests that use one method."""

    rows: Rows
    settings: list[Any]  # a Rewriting's, or a Mixing's parameters; its auxiliary models are the rows' streams
    members: Tensor | None = None  # (R, MEMBERS, V) logits of a Mixing's further sequences
    led_to: Tensor | None = None  # (R, V, HIDDEN) the hidden state to which each token leads, where tokens are tried

    def __post_init__(self) -> None:
        if (led_to := self.led_to) is not None:
            self.rows.lookahead = lambda tokens: led_to[torch.arange(len(tokens)), tokens]

    def take(self, order: Sequence[int]) -> "Batch":
        """A copy of some rows, in that order."""
        index = torch.tensor(order, dtype=torch.int64)
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(Rows):
            value = getattr(self.rows, field.name)
            if isinstance(value, Tensor) and field.name != "early_exit":
                moved[field.name] = value[index].clone()
            elif field.name in ("num_prompt", "num_generated") or (field.name == "history" and value is not None):
                moved[field.name] = [value[r] for r in order]
        if self.rows.early_exit is not None:
            parts = self.rows.early_exit.split([len(layers) for layers in self.rows.early_layers])
            moved["early_exit"] = torch.cat([self.rows.early_exit[:0], *(parts[r] for r in order)])
            moved["early_layers"] = [self.rows.early_layers[r] for r in order]
        streams = {name: logits[index].clone() for name, logits in self.rows.streams.items()}
        members = None if self.members is None else self.members[index].clone()
        rows = Rows(**moved, streams=streams, heads=self.rows.heads)
        led_to = None if self.led_to is None else self.led_to[index]
        return Batch(rows, [self.settings[r] for r in order], members, led_to)


def run(method: Method[Any], batch: Batch) -> Tensor:
    """The batch's new logits; the rows' state changes."""
    rows = batch.rows
    if isinstance(method, StreamMixer):
        return _mixed([method.mix(params) for params in batch.settings], batch)
    assert isinstance(method, LogitsRewriter)
    return method.rewrite(rows, batch.settings)


def _mixed(mixes: Sequence[Mix], batch: Batch) -> Tensor:
    """Members are rows of the batch behind the others; what auxiliary models say of them is what they say of all."""
    rows, num = batch.rows, len(mixes)
    if not any(mix.num_companions for mix in mixes):
        return mix_rows(rows.logits, rows.streams, [MixedRow(r, mix, [r]) for r, mix in enumerate(mixes)])
    assert batch.members is not None
    logits = torch.cat([rows.logits, batch.members.flatten(0, 1)])
    streams = {name: torch.cat([given, given.repeat_interleave(MEMBERS, 0)]) for name, given in rows.streams.items()}
    cells = [[r, *range(num + MEMBERS * r, num + MEMBERS * (r + 1))] for r in range(num)]
    result = mix_rows(logits, streams, [MixedRow(r, mix, cells[r]) for r, mix in enumerate(mixes)])
    assert torch.equal(result[num:], logits[num:])
    return result[:num]


def random_batch(method: Method[Any], params: Sequence[Params], seed: int = 0) -> Batch:
    """A row for each, with random logits some of which are banned, and what the method declares that it reads."""
    random, num_rows = torch.Generator().manual_seed(seed), len(params)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    logits = 3 * normal(num_rows, VOCAB)
    logits[torch.rand(num_rows, VOCAB, generator=random) < 0.1] = -torch.inf
    logits[:, 7] = normal(num_rows)  # one that is allowed, whatever the draw
    rows = Rows(logits, [5] * num_rows, [(7 * r) % 19 for r in range(num_rows)])
    settings: list[Any] = list(params)
    if isinstance(method, StreamMixer):
        rows.streams = {name: 3 * normal(num_rows, VOCAB) for name in AUXILIARIES}
        return Batch(rows, settings, 3 * normal(num_rows, MEMBERS, VOCAB))
    assert isinstance(method, LogitsRewriter)
    settings = [method.at_prompt(method.resolve(one, StubVocabulary()), StubPrompt()) for one in params]
    rows.streams = {field: 3 * normal(num_rows, VOCAB) for field in method.stream_fields}
    rows.heads = {field: random_head(kind, normal) for field, kind in method.head_fields.items()}
    _add_needs(method, rows, random, normal)
    if "early_exit" in method.needs:
        rows.early_layers = [method.early_layers(one, Depth(8)) for one in params]
        rows.early_exit = 3 * normal(sum(map(len, rows.early_layers)), VOCAB)
    tries = "lookahead" in method.needs and not method.ahead_fields  # which heads of some kinds ask for: see test_kwd
    return Batch(rows, settings, led_to=normal(num_rows, VOCAB, HIDDEN) if tries else None)


def random_head(kind: str, normal: Any) -> dict[str, Tensor]:
    head = {part.rstrip("?"): normal(*(SIZES[size] for size in shape)) for part, shape in FILES[kind].parts.items()}
    return head | ({"temperatures": torch.tensor([0.0, 0.5, 1.0, 1.7])} if "temperatures" in head else {})


def _add_needs(method: LogitsRewriter[Any], rows: Rows, random: torch.Generator, normal: Any) -> None:
    num_rows = len(rows.logits)
    if "tokens" in method.needs:
        rows.tokens = torch.randint(3, (num_rows, WIDTH), generator=random) + 4  # few tokens, so that they repeat
        for row, (prompt, done) in enumerate(zip(rows.num_prompt, rows.num_generated, strict=True)):
            rows.tokens[row, prompt + done :] = -1
    if "hidden" in method.needs:
        rows.hidden = normal(num_rows, HIDDEN)
    if "random" in method.needs:
        rows.random = torch.rand(num_rows, generator=random)
    if "temperature" in method.needs:
        rows.temperature = torch.rand(num_rows, generator=random) + 0.2
    lengths = [prompt + done for prompt, done in zip(rows.num_prompt, rows.num_generated, strict=True)]
    if "attention" in method.needs:
        seen = torch.arange(WIDTH) < torch.tensor(lengths)[:, None]
        rows.attention = torch.rand(num_rows, WIDTH, generator=random).masked_fill(~seen, 0.0)
    if "history" in method.needs:
        rows.history = [torch.nn.functional.normalize(normal(length, HIDDEN), dim=1) for length in lengths]
    if method.state_size:
        rows.state = torch.full((num_rows, method.state_size), torch.nan)
