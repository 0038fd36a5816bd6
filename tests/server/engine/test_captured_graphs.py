"""What captured graphs of several models need, shown without a GPU: inputs that stay where they are, and states that
are taken before another model's graphs run in the memory that all graphs share."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whipstaff.server.engine.layout import AuxiliarySpec
from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.worker import auxiliary
from whipstaff.server.engine.worker.logits.model_hook import composite

HIDDEN, SHARED_MEMORY = 4, torch.zeros(8, 4)


class Captured(nn.Module):
    """Returns its number in memory that it shares with the other models, and notes where it reads."""

    def __init__(self, number: float = 1.0) -> None:
        super().__init__()
        self.number = number
        self.read: list[tuple[Tensor, list[int]]] = []

    def forward(self, input_ids: Tensor, positions: Tensor, *_: Any, **__: Any) -> Tensor:
        for tensor in (input_ids, positions):
            self.read.append((tensor, tensor.tolist()))
        return SHARED_MEMORY[: len(input_ids)].fill_(self.number)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> auxiliary.Auxiliary:
    """An auxiliary model with a context of 6 tokens and a vocabulary of 10, in steps of 8 at most."""
    model_config = SimpleNamespace(get_hidden_size=lambda: HIDDEN, get_vocab_size=lambda: 10)
    monkeypatch.setattr(auxiliary, "load_auxiliary", lambda spec, config: (Captured(2.0), model_config))
    config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 8]),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=4),
    )
    return auxiliary.Auxiliary(AuxiliarySpec(name="small", model="", max_len=6), config, torch.device("cpu"))


def test_an_auxiliary_model_reads_where_it_read_before(small: auxiliary.Auxiliary) -> None:
    for ids in ([1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]):
        small.forward(torch.tensor(ids, dtype=torch.int32), torch.arange(len(ids)) + 2)
    first_ids, first_places, ids, places = small.model.read
    assert first_ids[0].data_ptr() == ids[0].data_ptr()
    assert first_places[0].data_ptr() == places[0].data_ptr()
    assert (ids[1], places[1]) == ([9, 9, 9], [2, 3, 4])
    assert first_places[1] == [2, 3, 4, 5, 5, 5, 5, 5]


def test_a_models_states_outlive_the_next_ones_pass(small: auxiliary.Auxiliary) -> None:
    base = Captured()
    pipeline = SimpleNamespace(needed_auxiliaries=lambda: ["small", "again"], scores_prompts=False, histories=None)
    step = SimpleNamespace(pipeline=pipeline, is_in_forward=True, is_plain=False)
    swap(
        base,
        composite(Captured),
        whipstaff_step=step,
        whipstaff_auxiliaries={"small": small, "again": small},
        whipstaff_hidden_size=HIDDEN,
    )
    together = base(torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert together.tolist() == [[1.0] * HIDDEN + [2.0] * 2 * HIDDEN] * 2
    step.is_in_forward = False  # a capture
    assert base(torch.tensor([1, 2]), torch.tensor([0, 1])).tolist() == [[1.0] * HIDDEN] * 2


ON_CUDA = """
import sys
import whipstaff.server.engine.worker.cuda_worker
print([name for name in sys.modules if name.startswith(("vllm.v1.worker.cpu", "vllm.platforms.cpu"))])
"""


@pytest.mark.engine
def test_a_cuda_worker_imports_nothing_of_the_cpus() -> None:
    """vLLM's modules of the CPU's worker put stand-ins for streams, events and pinned memory into torch."""
    ran = subprocess.run([sys.executable, "-c", ON_CUDA], check=True, capture_output=True, text=True, timeout=300)
    found = ran.stdout.splitlines()[-1]
    assert found in ("[]", "['vllm.platforms.cpu']")  # the latter is this machine's platform
