"""Re-seating: the KV blocks of sequences that a search moves, forks, shrinks or drops.

What is kept is not computed again. Full blocks are shared by reference. The block in which a sequence goes on must be
its own and without a key: the first to go on from a sequence has that sequence's, where nobody else reads it, and the
others get a copy, which the worker makes before the step that writes there. Only where no block is free for a copy, or
where a sliding window has let go of what a shorter sequence needs again, is something computed once more.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request

_POSITIONAL = (FullAttentionManager, SlidingWindowManager, ChunkedLocalAttentionManager)


@dataclass
class Move:
    """A sequence that goes on from what another, or itself, has computed."""

    target: Request
    source: Request
    num_wanted: int  # leading tokens whose keys and values it can take over
    blocks: list[list[KVCacheBlock]] = field(default_factory=list)  # of each group of KV caches
    num_computed: int = 0  # tokens that they hold
    num_copied: int = 0  # blocks


def can_reseat(manager: KVCacheManager) -> bool:
    """Whether all of a model's caches are blocks of keys and values by position: a recurrent state cannot shrink."""
    return all(type(one) in _POSITIONAL for one in manager.coordinator.single_type_managers)


def reseat(manager: KVCacheManager, moves: Sequence[Move], staying: Sequence[Request], gone: Iterable[Request]) -> None:
    """Give the targets of `moves` their blocks, and free those of `gone`.

    Args:
        staying: sequences whose blocks stay as they are; moves may start from them.
        gone: who has blocks and will have none; targets are none of them.
    """
    managers = manager.coordinator.single_type_managers
    sources = {move.source.request_id for move in moves}
    for move in moves:
        _share(managers, move)
    released = [*gone, *(move.target for move in moves)]
    copies = _take_tails(managers, moves, staying)
    num_cached = {name: [one.num_cached_block.get(name, 0) for one in managers] for name in sources}
    for move in moves:
        for blocks in move.blocks:
            manager.block_pool.touch(blocks)
    for _, _, block in copies:
        block.ref_cnt += 1  # until the copy was made, or is not made after all
    for request in released:
        manager.free(request)
    for move, index, block in copies:
        _copy(manager, managers, move, index, block)
    for move in moves:
        name = move.target.request_id
        cached = num_cached[move.source.request_id]
        for one, blocks, num in zip(managers, move.blocks, cached, strict=True):
            one.req_to_blocks[name] = blocks
            one.num_cached_block[name] = min(num, move.num_computed // one.block_size)


def give_up_copies(manager: KVCacheManager, requests: Iterable[Request]) -> None:
    """Let sequences compute again what was to be copied for them: a copy takes up two blocks until it is made."""
    managers = manager.coordinator.single_type_managers
    for request in requests:
        if forget_copies(manager, request):
            blocks = [one.req_to_blocks[request.request_id] for one in managers]
            request.num_computed_tokens = _cut(manager, blocks, request.num_computed_tokens)


def forget_copies(manager: KVCacheManager, request: Request) -> bool:
    """Let go of copies that were to be made for a sequence that will not need its last blocks. Whether any were."""
    had_any = False
    for one in manager.coordinator.single_type_managers:
        own = {block.block_id for block in one.req_to_blocks.get(request.request_id, ())}
        for pair in [pair for pair in one._pending_cow_copies if pair[1].block_id in own]:
            one._pending_cow_copies.remove(pair)
            manager.block_pool.free_blocks(pair)
            had_any = True
    return had_any


def _cut(manager: KVCacheManager, blocks: Sequence[list[KVCacheBlock]], num_computed: int) -> int:
    """Free the blocks of one sequence that are not full, in any group of its caches. Tokens that are left computed."""
    size: int = manager.coordinator.scheduler_block_size
    num_left = num_computed // size * size
    for one, held in zip(manager.coordinator.single_type_managers, blocks, strict=True):
        manager.block_pool.free_blocks(reversed(held[num_left // one.block_size :]))
        del held[num_left // one.block_size :]
    return num_left


def _share(managers: Sequence[Any], move: Move) -> None:
    """The blocks that hold what a move keeps, the last perhaps in part. All of it, or nothing where some are gone."""
    held = [one.req_to_blocks.get(move.source.request_id, []) for one in managers]
    move.num_computed = move.num_wanted
    move.blocks = [blocks[: -(-move.num_wanted // one.block_size)] for one, blocks in zip(managers, held, strict=True)]
    for one, blocks in zip(managers, move.blocks, strict=True):
        needed = blocks[one.get_num_skipped_tokens(move.num_wanted) // one.block_size :]
        if len(blocks) * one.block_size < move.num_wanted or any(block.is_null for block in needed):
            move.num_computed, move.blocks = 0, [[] for _ in managers]
            return


def _take_tails(
    managers: Sequence[Any], moves: Sequence[Move], staying: Sequence[Request]
) -> list[tuple[Move, int, KVCacheBlock]]:
    """Take out of moves' blocks those that they cannot write into, to be copied: (move, which group of caches, block).
    The others are theirs alone when everybody has let go who does not stay."""
    taken = {
        block.block_id for request in staying for one in managers for block in one.req_to_blocks[request.request_id]
    }
    for move in moves:
        for one, blocks in zip(managers, move.blocks, strict=True):
            taken |= {block.block_id for block in blocks[: move.num_computed // one.block_size]}
    copies = []
    for move in sorted(moves, key=lambda move: move.target is not move.source):
        for index, (one, blocks) in enumerate(zip(managers, move.blocks, strict=True)):
            if not move.num_computed % one.block_size:
                continue
            tail = blocks[-1]
            if one.block_pool.is_block_writable(tail) and tail.block_id not in taken:
                taken.add(tail.block_id)
            else:
                copies.append((move, index, blocks.pop()))
    return copies


def _copy(manager: KVCacheManager, managers: Sequence[Any], move: Move, index: int, block: KVCacheBlock) -> None:
    """Give a move a copy of a block that it shares in part; without room for one, let it compute that part again."""
    pool, own, blocks = manager.block_pool, managers[index], move.blocks[index]
    is_kept = len(blocks) == move.num_computed // own.block_size and move.num_computed % own.block_size
    if not is_kept:  # another group of its caches had no room
        pool.free_blocks([block])
        return
    if pool.get_num_free_blocks():
        (copy,) = pool.get_new_blocks(1)
        blocks.append(copy)
        copy.ref_cnt += 1  # vLLM lets go of both when the copy was made
        own._pending_cow_copies.append((block, copy))
        move.num_copied += 1
        return
    pool.free_blocks([block])
    move.num_computed = _cut(manager, move.blocks, move.num_computed)
