"""What is added to answers on their way out."""

from whipstaff.server.api.sse import header_of


def test_a_header_is_ascii_and_bounded() -> None:
    value = header_of(["naïve\r\nSet-Cookie: x", "y" * 5000])
    assert value.isascii() and value.isprintable() and len(value) == 1000 and value.startswith("na\\xefve  Set")
