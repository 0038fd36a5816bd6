"""run_edits_ in plain torch: one token after the other, one instruction after the other."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from whipstaff.cuda_ext.instructions import MAX_GROUP, Instruction, Opcode, Operand, Phi
from whipstaff.cuda_ext.reference import IS_CHECKED, apply_phi, compute_type


class Call(NamedTuple):
    """The tensors of one call that programs may read and write."""

    lines: Tensor
    program: list[Instruction]
    tokens: Tensor
    gains: Tensor
    history: Tensor
    meter: Tensor | None
    encoder: Tensor | None
    encoder_bias: Tensor | None
    kept: Tensor | None

    @property
    def num_conditions(self) -> int:
        return self.tokens.shape[1] - 2

    @property
    def sizes(self) -> dict[Operand, int]:
        """One past the highest that an operand of each kind may be, where it has bounds."""
        num_features = 0 if self.encoder is None else len(self.encoder)
        return {
            Operand.GAIN: self.gains.shape[1],
            Operand.CONDITION: self.num_conditions,
            Operand.LINE: len(self.lines),
            Operand.MAYBE_LINE: len(self.lines),
            Operand.PHI: len(Phi),
            Operand.FEATURE: num_features,
            Operand.NUM_FEATURES: num_features,
        }


def run_edits_(
    x: Tensor,
    lines: Tensor,
    code: Tensor,
    args: Tensor,
    tokens: Tensor,
    gains: Tensor,
    history: Tensor,
    residual: Tensor | None = None,
    meter: Tensor | None = None,
    encoder: Tensor | None = None,
    encoder_bias: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    concerned = (tokens[: len(x), 0] >= 0).nonzero().flatten().tolist()
    if not concerned:
        return
    program = [Instruction(*i, *a) for i, a in zip(code.tolist(), args.tolist(), strict=True)]
    call = Call(lines, program, tokens, gains, history, meter, encoder, encoder_bias, kept)
    if IS_CHECKED:
        for token in concerned:
            check(call, token)
    for token in concerned:
        h = x[token].to(compute_type(x), copy=True)
        if residual is not None:
            h += residual[token]
        machine = Machine(call, token, h, pc=int(tokens[token, 0]), left=len(program))
        machine.run()
        if machine.is_changed:
            x[token] = machine.h.to(x.dtype)
            if residual is not None:
                residual[token] = 0


_BOUND: list[tuple[Tensor | None, ...]] = []  # what `bind_edits_` was given: the reference needs tensors, not addresses


def bind_edits_(bound: Tensor, site: int, *tables: Tensor | None) -> None:
    bound[site, 0] = len(_BOUND)
    _BOUND.append(tables)


def run_bound_edits_(x: Tensor, residual: Tensor | None, bound: Tensor, site: int) -> None:
    lines, code, args, tokens, gains, history, *others = _BOUND[int(bound[site, 0])]
    assert lines is not None and code is not None and args is not None
    assert tokens is not None and gains is not None and history is not None
    run_edits_(x, lines, code, args, tokens, gains, history, residual, *others)


@dataclass
class Machine:
    """One token's registers, and a step for every instruction."""

    call: Call
    token: int
    h: Tensor  # (W,)
    pc: int  # the next instruction
    left: int  # how many may still run: a program that jumps in circles ends too
    g: float = 1.0
    saved: float = 0.0
    u_in: float = 1.0
    u_out: float = 1.0
    mean: float = 0.0
    tau: float = -math.inf
    r: Tensor | None = None  # (W,) what DIRs have written apart from h; None: zeros
    is_apart: bool = False
    is_changed: bool = False

    def run(self) -> None:
        program = self.call.program
        while 0 <= self.pc < len(program) and self.left > 0:
            i = program[self.pc]
            self.pc, self.left = self.pc + 1, self.left - 1
            STEPS.get(i.op, Machine.end)(self, i)

    @property
    def length(self) -> float:
        return float(self.h.norm())

    def reading(self, line: Tensor) -> Tensor:
        """line . h. Always this sum, of one line at a time: TOP_K compares readings bit for bit."""
        return (line.to(self.h.dtype) * self.h).sum()

    def move_to(self, h: Tensor) -> None:
        """h, as far as the gain goes."""
        if self.g != 0:
            self.h = h if self.g == 1 else self.h + self.g * (h - self.h)
            self.is_changed = True

    def history_row(self, condition: int) -> Tensor | None:
        """(M,) the readings that the token's condition reads and writes."""
        row = int(self.call.tokens[self.token, 2 + condition])
        return self.call.history[row] if 0 <= row < len(self.call.history) else None

    def past(self, condition: int, position: int) -> float:
        """What was read at a position, NaN where nothing was."""
        row = self.history_row(condition)
        return float(row[position]) if row is not None and 0 <= position < len(row) else math.nan

    @property
    def position(self) -> int:
        return int(self.call.tokens[self.token, 1])

    def end(self, i: Instruction) -> None:
        self.left = 0

    def jump(self, i: Instruction) -> None:
        self.pc = i.i0

    def gain(self, i: Instruction) -> None:
        self.g = i.a * (float(self.call.gains[self.token, i.i0]) if i.i0 >= 0 else 1.0)

    def when(self, i: Instruction) -> None:
        self.g *= i.c * self.past(i.i0, 0) > i.a if i.i1 else self.is_on(i)

    def is_on(self, i: Instruction) -> bool:
        """Above `a` turns on, at or below `b` turns off, and between them the state before holds."""
        for position in range(self.position, -1, -1):
            value = i.c * self.past(i.i0, position)
            if value > i.a:
                return True
            if not value > i.b:
                return False
        return False

    def ramp(self, i: Instruction) -> None:
        value = self.past(i.i0, self.position)
        self.g *= i.c if math.isnan(value) else i.c + (i.d - i.c) * min(max((value - i.a) / (i.b - i.a), 0.0), 1.0)

    def diag(self, i: Instruction) -> None:
        if i.i0 >= 0 or i.i1 >= 0:
            mul = self.call.lines[i.i0].to(self.h.dtype) if i.i0 >= 0 else 1.0
            add = self.call.lines[i.i1].to(self.h.dtype) if i.i1 >= 0 else 0.0
            self.move_to(self.h * mul + add)

    def cross(self, i: Instruction) -> None:
        mul, cross = self.call.lines[i.i0].to(self.h.dtype), self.call.lines[i.i1].to(self.h.dtype)
        partner = torch.arange(len(self.h), device=self.h.device) ^ i.i2
        self.move_to(mul * self.h + cross * self.h[partner])

    def dir(self, i: Instruction) -> None:
        group = self.take_group()
        if self.g == 0:
            return
        z = self.h.new_tensor([i.bias for i in group])
        for r, i in enumerate(group):
            if i.i0 >= 0:
                z[r] += (self.reading(self.call.lines[i.i0]) - self.mean * i.e) * self.u_in
        phi = torch.tensor([[i.i2 for i in group]], device=z.device)
        phi_args = z.new_tensor([[i[6:10] for i in group]])
        gain = 1.0 if self.is_apart else self.g
        self.write(group, (gain * self.u_out * apply_phi(phi, phi_args, z[None], self.tau)[0]).tolist())

    def write(self, group: list[Instruction], scales: list[float]) -> None:
        change = torch.zeros_like(self.h)
        for i, scale in zip(group, scales, strict=True):
            if i.i1 >= 0 and scale != 0:
                change += scale * self.call.lines[i.i1].to(self.h.dtype)
                self.is_changed |= not self.is_apart
        if self.is_apart:
            self.r = self.gathered + change
        else:
            self.h = self.h + change

    @property
    def gathered(self) -> Tensor:
        return torch.zeros_like(self.h) if self.r is None else self.r

    def apart(self, i: Instruction) -> None:
        self.r, self.is_apart = None, True

    def take(self, i: Instruction) -> None:
        self.is_apart = False
        gain = self.g * i.a
        if gain != 0:
            line = self.call.lines[i.i0].to(self.h.dtype) if i.i0 >= 0 else 0.0
            target = self.gathered + self.u_out * line + self.mean
            self.h = target if gain == 1 else self.h + gain * (target - self.h)
            self.is_changed = True

    def take_group(self) -> list[Instruction]:
        """The directions that read the same h, from the one that has begun on; all of them count as done."""
        program, group = self.call.program, [self.call.program[self.pc - 1]]
        while len(group) < MAX_GROUP and (at := self.next_in_group()) >= 0:
            self.left -= 1 + (at != self.pc)
            self.pc = at + 1
            group.append(program[at])
        return group

    def next_in_group(self) -> int:
        """Where the next direction of a group is, before or behind a JUMP; -1: the group ends."""
        program, at = self.call.program, self.pc
        if at < len(program) and program[at].op == Opcode.JUMP:
            at = program[at].i0
        is_next = 0 <= at < len(program) and program[at].op == Opcode.DIR and program[at].i3 != 1
        return at if is_next else -1

    def save(self, i: Instruction) -> None:
        self.saved = self.length

    def renorm(self, i: Instruction) -> None:
        if self.is_changed and self.length > 0:
            self.h = self.h * (self.saved / self.length)

    def probe(self, i: Instruction) -> None:
        row, position = self.history_row(i.i1), 0 if i.i2 else self.position
        if row is not None and 0 <= position < len(row):
            reading = self.reading(self.call.lines[i.i0])
            row[position] = (reading / self.h.norm() if i.i3 else reading) + i.bias

    def meter(self, i: Instruction) -> None:
        if self.call.meter is not None:
            self.call.meter.add_(self.call.meter.new_tensor([self.length, 1.0]))

    def top_k(self, i: Instruction) -> None:
        if self.call.encoder is None or i.i1 <= 0:
            return
        z = torch.stack([self.reading(row) for row in self.call.encoder[i.i0 : i.i0 + i.i1]]) * self.u_in
        if self.call.encoder_bias is not None:
            z = z + self.call.encoder_bias[i.i0 : i.i0 + i.i1]
        z = torch.where(z.isnan(), -math.inf, z)  # what cannot be ordered is not among the largest
        self.tau = float(z.topk(min(max(i.i2, 1), len(z))).values[-1])

    def norm_in(self, i: Instruction) -> None:
        self.u_in, self.u_out, self.mean = 1.0, 1.0, 0.0
        if i.i0 == 1:
            self.u_out = self.length / math.sqrt(len(self.h))
            self.u_in = 1 / self.u_out if self.u_out > 0 else 0.0  # a row of zeros reads as one
        elif i.i0 == 2:
            self.mean, self.u_out = float(self.h.mean()), float(self.h.std())
            self.u_in = 1 / (self.u_out + 1e-5)

    def keep(self, i: Instruction) -> None:
        if self.call.kept is not None:
            self.call.kept[self.token] = self.h.to(self.call.kept.dtype)


STEPS: dict[int, Callable[[Machine, Instruction], None]] = {op: getattr(Machine, op.name.lower()) for op in Opcode}


def check(call: Call, token: int) -> None:
    """Walks the token's program, which no data can divert, and refuses what it names but is not there."""
    num_instructions, pc = len(call.program), int(call.tokens[token, 0])
    if pc >= num_instructions:
        raise RuntimeError(f"tokens[{token}, 0] is {pc}, code has {num_instructions} instructions")
    for _ in range(num_instructions):
        i = call.program[pc]
        try:
            check_instruction(call, token, i)
        except ValueError as mistake:
            raise RuntimeError(f"token {token}, instruction {pc}: {mistake}") from None
        if i.op == Opcode.END:
            return
        pc = i.i0 if i.op == Opcode.JUMP else pc + 1
        if not 0 <= pc < num_instructions:
            raise RuntimeError(f"token {token} leaves the code for {pc}, it has {num_instructions} instructions")
    raise RuntimeError(f"token {token}: its program does not end")


def check_instruction(call: Call, token: int, i: Instruction) -> None:
    """ValueError: it names what is not there."""
    within("op", i.op, 0, len(Opcode))
    op, sizes, width = list(Opcode)[i.op], call.sizes, call.lines.shape[1]
    if op.needs and getattr(call, op.needs) is None:
        raise ValueError(f"{op.name} needs {op.needs}")
    for kind, before, value in zip(op.operands, i[:5], i[1:6], strict=False):
        if kind in sizes:
            index = before + value - 1 if kind == Operand.NUM_FEATURES else value
            within(kind.title, index, kind.lowest, sizes[kind])
        if kind == Operand.CONDITION:
            within("history row", max(int(call.tokens[token, 2 + value]), -1), -1, len(call.history))
        if kind == Operand.STRIDE and (value <= 0 or value & (value - 1) or width % (2 * value)):
            raise ValueError(f"stride {value} does not pair {width} columns")


def within(title: str, index: int, lowest: int, size: int) -> None:
    if not lowest <= index < size:
        raise ValueError(f"{title} {index} is outside [{lowest}, {size})")
