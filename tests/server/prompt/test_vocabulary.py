"""A tokenizer's tokens as text and as bytes."""

import pytest
from serving import make_tokenizer
from transformers import PreTrainedTokenizerFast

from whipstaff.server.prompt.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece does it: a letter that has no token of its own is written in tokens of its bytes."""
    from tokenizers import Tokenizer, decoders, models

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "a", "b"]
    model = models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", ["ab", "a\u00e9b\u20aca", "\U0001f642", "b\ufffda"])
def test_bytes_of_tokens_make_up_the_text(request: pytest.FixtureRequest, name: str, text: str) -> None:
    tokenizer = request.getfixturevalue(name)
    words, ids = Vocabulary.of(tokenizer), tokenizer.encode(text, add_special_tokens=False)
    assert bytes(byte for token in ids for byte in words.bytes_of(token)).decode() == text
