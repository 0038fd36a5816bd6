"""The served model's tokens as text, for decoding methods whose parameters speak of text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_ALPHABET = {letter: byte for byte, letter in bytes_to_unicode().items()}  # in which byte-level tokenizers write bytes
_BROKEN = "\ufffd"  # stands for bytes that are no letter
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # as SentencePiece writes a byte


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What `decoding.method.Vocabulary` asks for, of one tokenizer."""

    texts: Sequence[str]  # by id, as they read in the middle of a text; "" where an id has none
    ids: Mapping[str, int]  # text -> the first id that reads so
    eos: Sequence[int]
    tokenizer: Any

    @staticmethod
    def of(tokenizer: Any, eos: Iterable[int] = (), most: int | None = None) -> "Vocabulary":
        """`eos` are further tokens that end a generation, beside the tokenizer's own; of `most` tokens the model says
        how likely they are, whatever more the tokenizer knows."""
        num = len(tokenizer) if most is None else min(len(tokenizer), most)
        pieces = tokenizer.convert_ids_to_tokens(range(num))
        texts = [_text(tokenizer, piece) for piece in pieces]
        ids: dict[str, int] = {}
        for index, text in enumerate(texts):
            ids.setdefault(text, index)
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return Vocabulary(texts, ids, tuple(dict.fromkeys([*own, *eos])), tokenizer)

    @property
    def num_tokens(self) -> int:
        return len(self.texts)

    def id_of(self, text: str) -> int | None:
        return self.ids.get(text) if text else None

    def ids_with(self, text: str) -> Sequence[int]:
        return _ids_with(self, text)

    def bytes_of(self, token: int) -> list[int]:
        """What a token adds to the bytes of a text: of some, no letter is whole."""
        text = self.texts[token]
        if _BROKEN in text or _BYTE.fullmatch(text):
            piece = str(self.tokenizer.convert_ids_to_tokens(token))
            if (byte := _BYTE.fullmatch(piece)) is not None:
                return [int(byte[1], 16)]
            if all(letter in _ALPHABET for letter in piece):
                return [_ALPHABET[letter] for letter in piece]
        return list(text.encode())

    def encode(self, text: str) -> Sequence[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found


@lru_cache(maxsize=256)
def _ids_with(words: Vocabulary, text: str) -> Sequence[int]:
    return tuple(index for index, one in enumerate(words.texts) if text in one)


def _text(tokenizer: Any, piece: str | None) -> str:
    """A token's text; the letter before it keeps its leading blank."""
    if piece is None:
        return ""
    text: str = tokenizer.convert_tokens_to_string(["a", piece])
    return text.removeprefix("a")
