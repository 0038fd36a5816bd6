"""What a worker's step edits, made without a model: nothing of it but the tables of programs."""

from typing import Any

import torch
from torch import nn

from whipstaff.server.engine.worker.edits.captures import Captures
from whipstaff.server.engine.worker.edits.forms import Forms
from whipstaff.server.engine.worker.edits.histories import Histories
from whipstaff.server.engine.worker.edits.module_edits import ModuleEdits
from whipstaff.server.engine.worker.edits.sites import Sites
from whipstaff.server.engine.worker.edits.soft_prompts import NoSoftRows
from whipstaff.server.engine.worker.edits.step_edits import StepEdits
from whipstaff.server.engine.worker.edits.token_table import TokenTable
from whipstaff.server.engine.worker.requests import Requests

CPU = torch.device("cpu")


def step_edits(
    requests: Requests, tables: Any, max_tokens: int = 256, num_histories: int = 0, max_len: int = 0
) -> StepEdits:
    return StepEdits(
        requests,
        TokenTable(max_tokens, CPU),
        Histories(requests, num_histories, max_len, CPU),
        Sites(tables, torch.zeros(0, 2)),
        ModuleEdits(
            nn.Module(), max_tokens, CPU, dict[str, Any]().__getitem__, 0, edits_router=False, edits_attention=False
        ),
        NoSoftRows(),
        Captures(requests, [], 0),
        Forms(),
    )
