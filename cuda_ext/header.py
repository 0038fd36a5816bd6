"""Writes csrc/instructions.h, what C++ knows of `instructions`: python -m whipstaff.cuda_ext.header"""

from collections.abc import Iterable
from enum import IntEnum
from itertools import zip_longest
from pathlib import Path

from whipstaff.cuda_ext.instructions import MAX_GROUP, NUM_OPERANDS, NUM_PHI_ARGS, Opcode, Operand, Phi

PATH = Path(__file__).parent / "csrc" / "instructions.h"

HEADER = """\
// Instructions as the machines know them, written by `python -m whipstaff.cuda_ext.header`: edit instructions.py.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace whipstaff {{

constexpr int MAX_GROUP = {max_group};  // directions that read the same h
constexpr int NUM_OPERANDS = {num_operands};
constexpr int NUM_PHI_ARGS = {num_phi_args};

{operand}
{needs}
{op}
{phi}
WHIPSTAFF_HOST_DEVICE inline bool is_pair(Phi phi) {{ return {is_pair}; }}

// DO(instruction, the machine's step) for each of them.
#define WHIPSTAFF_FOR_EACH_OP(DO) \\
{for_each}

struct OperandKind {{
  const char* title;
  int32_t lowest;
}};

constexpr OperandKind OPERAND_KINDS[] = {{
{operand_kinds}
}};

struct OpKind {{
  const char* name;
  Operand operands[NUM_OPERANDS];
  int passes;  // over the row, about
  Needs needs;
  const char* needed;
}};

constexpr OpKind OP_KINDS[] = {{
{op_kinds}
}};

}}  // namespace whipstaff
"""


def header() -> str:
    needed = sorted({op.needs for op in Opcode} - {""})
    return HEADER.format(
        max_group=MAX_GROUP,
        num_operands=NUM_OPERANDS,
        num_phi_args=NUM_PHI_ARGS,
        operand=_enumeration(Operand),
        needs=f"enum class Needs : int32_t {{ {', '.join(map(_camel, ['nothing', *needed]))} }};\n",
        op=_enumeration(Opcode) + f"constexpr int NUM_OPS = {len(Opcode)};\n",
        phi=_enumeration(Phi, (phi.formula for phi in Phi)) + f"constexpr int NUM_PHIS = {len(Phi)};\n",
        is_pair=" || ".join(f"phi == Phi::{_camel(phi.name)}" for phi in Phi if phi.is_pair),
        for_each=" \\\n".join(f"  DO({_camel(op.name)}, {op.name.lower()})" for op in Opcode),
        operand_kinds=_rows(f'"{kind.title}", {kind.lowest}' for kind in Operand),
        op_kinds=_rows(_op_kind(op) for op in Opcode),
    )


def _op_kind(op: Opcode) -> str:
    kinds = ", ".join(f"Operand::{_camel(kind.name)}" for kind in op.operands)
    return f'"{op.name}", {{{kinds}}}, {op.passes}, Needs::{_camel(op.needs or "nothing")}, "{op.needs}"'


def _enumeration(kind: type[IntEnum], comments: Iterable[str] = ()) -> str:
    lines = (f"  {_camel(member.name)} = {int(member)}," for member in kind)
    told = (f"{line}  // {comment}" if comment else line for line, comment in zip_longest(lines, comments))
    return "\n".join([f"enum class {kind.__name__} : int32_t {{", *told, "};\n"])


def _rows(rows: Iterable[str]) -> str:
    return "\n".join(f"    {{{row}}}," for row in rows)


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


if __name__ == "__main__":
    PATH.write_text(header())
