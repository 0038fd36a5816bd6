"""One table of instructions: everything that knows them agrees with it, and nothing of it is left out anywhere."""

import re
from pathlib import Path
from random import Random

import pytest
import torch

from whipstaff import cuda_ext
from whipstaff.cuda_ext import Opcode, Phi, header, interpreter
from whipstaff.cuda_ext.instructions import Operand

from .test_run_edits import WIDTHS, any_program, direction, run, tables

CSRC = Path(header.__file__).parent / "csrc"
RANDOM_PROGRAMS = [instruction for seed in range(300) for instruction in any_program(Random(seed), WIDTHS[seed % 8])]


def test_the_header_is_current() -> None:
    assert header.PATH.read_text() == header.header(), "run python -m whipstaff.cuda_ext.header, then build"


def test_an_operator_that_is_not_in_the_header_would_be_seen() -> None:
    """What the test above rests on: the header says each member's number and name."""
    text = header.header()
    for kind in (Opcode, Phi, Operand):
        listed = re.search(rf"enum class {kind.__name__} : int32_t {{\n(.*?)}};", text, re.DOTALL)
        assert listed
        numbers = re.findall(r"^  (\w+) = (\d+),", listed[1], re.MULTILINE)
        assert [(name.lower(), int(n)) for name, n in numbers] == [(k.name.replace("_", "").lower(), k) for k in kind]


@pytest.mark.parametrize("op", Opcode)
def test_an_instruction_is_known_everywhere(op: Opcode) -> None:
    assert interpreter.STEPS[op] is getattr(interpreter.Machine, op.name.lower())
    assert re.sub(r"\s+", " ", f"{op.name} {op.effect}") in re.sub(r"\s+", " ", str(cuda_ext.run_edits_.__doc__))
    for machine in ("run_edits.cpp", "run_edits.cuh"):  # the compiler asks for them too, but CUDA's is not always built
        both = (CSRC / machine).read_text() + (CSRC / "run_edits.cuh").read_text().split("#ifdef __CUDACC__\n\n")[0]
        assert f"void {op.name.lower()}(const Instruction&" in both


def test_programs_of_the_tests_hold_every_instruction_and_function() -> None:
    ops = {int(instruction[0]) for instruction in RANDOM_PROGRAMS}
    assert ops == set(Opcode) - {Opcode.END, Opcode.JUMP}  # which `linked` puts between programs
    assert {int(i[3]) for i in RANDOM_PROGRAMS if i[0] == Opcode.DIR} == set(Phi)


@pytest.mark.parametrize("phi", Phi)
def test_every_function_but_off_does_something(phi: Phi) -> None:
    turned = [direction(r, r, phi, r == 0, [0.7, 0.1, 0.3, 0.2]) for r in range(2)]
    lines = [[1.0, 0.0], [0.0, 1.0]]
    changed = run(turned, [[1.5, 0.6]], lines)[0] != [[pytest.approx(1.5), pytest.approx(0.6)]]
    reference = torch.tensor([[1.5, 0.6]])
    tokens = torch.zeros(1, 2, dtype=torch.int32)
    arguments = torch.tensor(lines), *tables(turned), tokens, torch.ones(1, 0), torch.ones(0, 0)
    interpreter.run_edits_(reference, *arguments)
    assert changed == (phi != Phi.OFF)
    assert torch.equal(reference, torch.tensor([[1.5, 0.6]])) == (phi == Phi.OFF)


@pytest.mark.parametrize("number", [-1, len(Opcode), 2**31 - 1])
def test_a_number_that_is_no_instruction_ends_the_program(number: int) -> None:
    add = (Opcode.DIAG, -1, 0)
    assert run([add, (number,), add], [[1.0]], [[1.0]])[0] == [[2.0]]
