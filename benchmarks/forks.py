"""What a fork of a search costs: seats whose contents are replaced, against new requests that hit the prefix cache.

    python benchmarks/forks.py [--requests N] [--max-tokens N]

Beam search (4 beams) and OPERA (5 beams, 5 candidates) run over a small random Llama in transformers, without an
engine. Of every decision it is counted what of the sequences that live on has to move (`worker.search.seats`, as the
engine places them), and for each block size: the blocks that are copied where seats are filled anew (one for each that
moves into a block that is not full, but for one of those that go on from the same sequence), and the tokens that are
computed once more where each that moves is a new request, of which the prefix cache has the full blocks. Nothing is
timed, so the numbers are the same on every machine.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from load import PROMPT_LEN, VOCABULARY, make_model, prompt
from search import OPERA, Loop
from transformers import AutoModelForCausalLM

from whipstaff.decoding.search.beam_search import BeamSearch, BeamSearchParams
from whipstaff.decoding.search.opera import Opera
from whipstaff.decoding.search.search import Decision, Living, SearchFacts, SearchMethod
from whipstaff.server.engine.searches import Placed, SearchStep
from whipstaff.server.engine.worker.search.seats import seated

BLOCKS = 16, 32, 128  # tokens: a GPU's, a test's, a CPU's
SEARCHES: dict[str, tuple[SearchMethod[Any], Any]] = {
    "beam search": (BeamSearch(), BeamSearchParams(num_beams=4)),
    "opera": (Opera(), OPERA),
}


class Moving(Loop):
    """A search whose decisions are noted as moves between seats."""

    def __init__(self, model: Any, search: Any, ids: Sequence[int], num_seats: int) -> None:
        super().__init__(model, search, ids)
        self.seats = tuple(str(seat) for seat in range(num_seats))
        self.living = self.seats[:1]
        self.steps: list[list[tuple[int, bool]]] = []  # of each that moves: tokens it keeps, whether it needs a copy
        self.num_computed = 0  # tokens

    def _decide(self, living: Living) -> Decision:
        decision = super()._decide(living)
        lengths = list(map(len, living.generated))
        step = SearchStep(self.living, self.seats, 1 << 20, 1 << 20)
        placed = seated(decision.living, lengths, step) if decision.living else []
        length_of = dict(zip(self.living, lengths, strict=True))
        stay = {id(one) for one in placed if one.stays and one.keep == length_of[one.source]}
        ordered = sorted(placed, key=lambda one: id(one) not in stay)
        self.steps.append(
            [
                (len(self.prompt) + one.keep, _needs_copy(one, ordered[:index], length_of[one.source]))
                for index, one in enumerate(ordered)
                if id(one) not in stay
            ]
        )
        self.living = tuple(one.seat for one in placed)
        self.num_computed += sum(len(one.tokens) for one in placed)
        return decision


def _needs_copy(one: Placed, before: Sequence[Placed], length: int) -> bool:
    """Whether what a partial block holds is somebody else's, too, or more than is kept."""
    return one.keep < length or any(other.source == one.source for other in before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(folder, hidden=64, layers=2)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    for name, (method, setting) in SEARCHES.items():
        ran = []
        for index in range(options.requests):
            search = method.start(setting, SearchFacts(PROMPT_LEN, options.max_tokens, frozenset()))
            ran.append(Moving(model, search, prompt(index, PROMPT_LEN, VOCABULARY), method.num_sequences(setting)))
            ran[-1].run()
        moves = [move for one in ran for step in one.steps for move in step]
        computed = sum(one.num_computed for one in ran)
        print(f"{name}: {sum(len(one.steps) for one in ran)} steps, {computed} tokens, {len(moves)} sequences moved")
        for block in BLOCKS:
            copies = sum(needs_copy and kept % block > 0 for kept, needs_copy in moves)
            again = sum(kept % block for kept, _ in moves)
            said = {"block": block, "copied_blocks": copies, "recomputed_tokens": again}
            print(
                json.dumps(said | {"per_token": round(again / computed, 3), "per_move": round(again / len(moves), 1)})
            )


if __name__ == "__main__":
    main()
