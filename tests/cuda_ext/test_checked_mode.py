"""Checked mode (WHIPSTAFF_CUDA_EXT_CHECKED=1) looks at every index and names what is wrong, whatever implements it."""

import inspect
from pathlib import Path

import pytest

from whipstaff.cuda_ext import Opcode, Phi

from .test_libraries import run_python
from .test_run_edits import Program, tables

SUPPORT = Path(__file__).parents[1] / "support"
PREAMBLES = {
    "compiled": "",
    "reference": "",
    "cuda_on_cpu": (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import cuda_on_cpu\n"
        "kept = cuda_on_cpu.instead(); kept.__enter__()"
    ),
}


def run_checked(lines: list[str], implementation: str) -> tuple[str, str]:
    """What a program says, and what went wrong in it."""
    done = run_python(
        "\n".join(["import torch; from whipstaff import cuda_ext", PREAMBLES[implementation], *lines]),
        WHIPSTAFF_CUDA_EXT="reference" if implementation == "reference" else "compiled",
        WHIPSTAFF_CUDA_EXT_CHECKED="1",
    )
    return done.stdout, done.stderr


OUT_OF_RANGE = {
    "index[1] is 3, rows has 3 rows": (
        "cuda_ext.put_rows_(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([-1, 3]).int())"
    ),
    "rows[0, 1] is 2, streams[1] has 2 rows": (
        "s = torch.ones(2, 4); cuda_ext.mix_logits_(s, [s, s], torch.tensor([[0, 2], [1, 1]]), torch.ones(2, 2))"
    ),
    "block_table[0, 1] is -1, keys have 3 blocks": (
        "table, context = torch.tensor([[0, -1]]).int(), torch.tensor([5]).int();"
        "cuda_ext.attention_rows(torch.ones(1, 1, 8), torch.ones(3, 4, 1, 8), table, context, 1.0, 8)"
    ),
}


@pytest.mark.parametrize("implementation", PREAMBLES)
def test_rows_that_are_not_there_are_refused(implementation: str) -> None:
    attempts = [f"try: {call}\nexcept RuntimeError as error: print(error)" for call in OUT_OF_RANGE.values()]
    said, wrong = run_checked(attempts, implementation)
    for message in OUT_OF_RANGE:
        assert message in said, wrong


MISTAKES: dict[str, tuple[Program, str]] = {
    "tokens[1, 0] is 7, code has 2 instructions": ([(Opcode.SAVE,), (Opcode.END,)], "tokens[1, 0] = 7"),
    "token 1, instruction 0: line 3 is outside [-1, 3)": ([(Opcode.DIAG, -1, 3), (Opcode.END,)], ""),
    "token 1, instruction 0: line 5 is outside [-1, 3)": ([(Opcode.TAKE, 5), (Opcode.END,)], ""),
    "token 1, instruction 0: line -1 is outside [0, 3)": ([(Opcode.CROSS, 0, -1, 1), (Opcode.END,)], ""),
    "token 1, instruction 1: stride 8 does not pair 8 columns": (
        [(Opcode.SAVE,), (Opcode.CROSS, 0, 0, 8), (Opcode.END,)],
        "",
    ),
    f"token 1, instruction 0: phi 99 is outside [0, {len(Phi)})": ([(Opcode.DIR, 0, 0, 99), (Opcode.END,)], ""),
    "token 1, instruction 0: gains column 1 is outside [-1, 1)": ([(Opcode.GAIN, 1), (Opcode.END,)], ""),
    "token 1, instruction 0: condition 1 is outside [0, 1)": ([(Opcode.WHEN, 1), (Opcode.END,)], ""),
    "token 1, instruction 0: history row 2 is outside [-1, 2)": (
        [(Opcode.PROBE, 0, 0), (Opcode.END,)],
        "tokens[1, 2] = 2",
    ),
    "token 1, instruction 0: TOP_K needs encoder": ([(Opcode.TOP_K, 0, 1, 1), (Opcode.END,)], ""),
    "token 1, instruction 0: encoder row 3 is outside [0, 3)": (
        [(Opcode.TOP_K, 1, 3, 1), (Opcode.END,)],
        "encoder = lines",
    ),
    "token 1, instruction 0: KEEP needs kept": ([(Opcode.KEEP,), (Opcode.END,)], ""),
    f"token 1, instruction 0: op {len(Opcode)} is outside [0, {len(Opcode)})": ([(len(Opcode),), (Opcode.END,)], ""),
    "token 1, instruction 0: gains column -2 is outside [-1, 1)": ([(Opcode.GAIN, -2), (Opcode.END,)], ""),
    "token 1, instruction 0: stride 0 does not pair 8 columns": ([(Opcode.CROSS, 0, 0, 0), (Opcode.END,)], ""),
    "token 1, instruction 0: encoder row -1 is outside [0, 3)": (
        [(Opcode.TOP_K, 0, 0, 1), (Opcode.END,)],
        "encoder = lines",
    ),
    "token 1 leaves the code for 1, it has 1 instructions": ([(Opcode.SAVE,)], ""),
    "token 1 leaves the code for -3, it has 1 instructions": ([(Opcode.JUMP, -3)], ""),
    "token 1: its program does not end": ([(Opcode.SAVE,), (Opcode.JUMP, 0)], ""),
}

ATTEMPT = """
tokens = torch.tensor([[-1, 0, 0], [0, 0, 0]], dtype=torch.int32)
x, lines, encoder = torch.ones(2, 8), torch.ones(3, 8), None
{change}
code, args = tables({program})
try: cuda_ext.run_edits_(x, lines, code, args, tokens, torch.ones(2, 1), torch.ones(2, 5), encoder=encoder)
except RuntimeError as error: print(error)
else: print("accepted")
"""


@pytest.mark.parametrize("implementation", PREAMBLES)
def test_a_mistake_in_a_program_is_named(implementation: str) -> None:
    define = inspect.getsource(tables).replace(": Program", "").replace(" -> tuple[Tensor, Tensor]", "")
    cases: list[tuple[Program, str]] = [*MISTAKES.values(), ([(Opcode.SAVE,), (Opcode.PROBE, 0, 0), (Opcode.END,)], "")]
    attempts = [
        ATTEMPT.format(change=change, program=[[int(n) for n in i] for i in program]) for program, change in cases
    ]
    said, wrong = run_checked([define, *attempts], implementation)
    told = [line for line in said.splitlines() if "token" in line or line == "accepted"]
    assert len(told) == len(cases), wrong
    for line, message in zip(told, [*MISTAKES, "accepted"], strict=True):
        assert line.endswith(message)  # the compiled ones first say where they stand
