"""The command line's `whipstaff keys`: what a file of keys holds of a key, so that nobody writes the key itself."""

import argparse
import getpass
import secrets
import sys

from whipstaff.server.access.keys import digest_of

_NUM_BYTES = 32  # of a new key's chance


def main(words: list[str]) -> int:
    """The exit status; argparse itself exits with 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="whipstaff keys", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("hash", help="read a key from stdin, or ask for it, and print its sha256")
    commands.add_parser("new", help="make a key: it goes to stderr, once, and its sha256 to stdout")
    if parser.parse_args(words).command == "new":
        key = secrets.token_urlsafe(_NUM_BYTES)
        print(key, file=sys.stderr)
    else:
        key = getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    if not key or key != key.strip() or not key.isprintable():
        print("whipstaff keys: a key is printable text, without blanks around it", file=sys.stderr)
        return 1
    print(digest_of(key))
    return 0
