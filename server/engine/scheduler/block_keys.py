"""Keys of KV blocks: steered blocks get keys of their own in vLLM's prefix cache, and all others are shared.

A block's key must hold whatever changed the KV in it. An edit changes KV from its first position on, in later layers
there and everywhere after through attention; a request that needs auxiliary models must not take blocks that were
filled while those were skipped. So blocks from a request's first affected position on are keyed with a digest of its
plan, and blocks before it are shared with plain traffic.
"""

import hashlib
from collections.abc import Callable

from vllm.v1.request import Request

from whipstaff.server.plan import PositionedPlan

Hasher = Callable[[Request], list[bytes]]


def key_blocks(request: Request, placed: PositionedPlan, block_size: int) -> None:
    """Give `request`'s KV blocks keys that hold its plan, from the first position on whose KV the plan changes."""
    hasher: Hasher | None = request._block_hasher
    if hasher is None:  # prefix caching is off
        return
    first = 0 if placed.auxiliaries else placed.first_edited
    if first is None:
        return
    digest, generated = _digest(placed), b""
    if placed.plan.steering is not None and placed.plan.steering.counts_from_prompt_end:
        generated = str(placed.prompt_len).encode()

    plain: list[bytes] = []  # keys without the plan: each is made of the one before, however many come at once

    def keyed(request: Request) -> list[bytes]:
        del plain[len(request.block_hashes) :]  # a sequence of a search may have given up tokens
        ends = range(block_size * (len(plain) + 1), 1 << 62, block_size)
        mine, request.block_hashes = request.block_hashes, plain
        found = hasher(request)
        request.block_hashes = mine
        plain.extend(found)
        return [
            hashlib.sha256(key + digest + (generated if end > placed.prompt_len else b"")).digest()
            if end > first
            else key
            for key, end in zip(found, ends, strict=False)
        ]

    request._block_hasher = keyed
    request.block_hashes = []
    request.update_block_hashes()


def _digest(placed: PositionedPlan) -> bytes:
    """Of everything in the plan that changes KV: where which edits are, and which auxiliary models run."""
    steering = placed.plan.steering
    said: list[object] = [placed.edited, placed.auxiliaries]
    if steering is not None:
        said += [sorted(steering.token_ids), steering.schedules, steering.inserts]
        if steering.entropy_column >= 0:  # edits follow the distributions that tokens were drawn from
            said += [placed.plan.decoding, placed.plan.companions]
    return hashlib.sha256(repr(said).encode()).digest()
