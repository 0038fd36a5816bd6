"""run_edits_: every token runs its own small program of edits on its row."""

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from whipstaff import cuda_ext
from whipstaff.cuda_ext import Opcode, Phi, interpreter

from .batches import BATCHES, DTYPES, HIDDEN, POPULARITY, PROPERTY, slots, strided
from .tolerances import TOLERANCE

pytestmark = pytest.mark.usefixtures("library")

NAN = math.nan
Rows = list[list[float]]
Program = list[tuple[float, ...]]  # (op, i0, i1, i2, i3, i4, a, b, c, d, bias, e), the last ones may be left out


class Edits(NamedTuple):
    """The arguments of one call."""

    x: Tensor
    lines: Tensor
    code: Tensor
    args: Tensor
    tokens: Tensor
    gains: Tensor
    history: Tensor
    residual: Tensor | None = None
    meter: Tensor | None = None
    encoder: Tensor | None = None
    encoder_bias: Tensor | None = None
    kept: Tensor | None = None

    def copies(self, dtype: torch.dtype | None = None) -> "Edits":
        """Its own tensors, rows as far apart as before; the floating ones as `dtype`."""
        return Edits._make(None if t is None else self._copy(t, dtype) for t in self)

    @staticmethod
    def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        chosen = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=chosen).copy_(tensor)


def tables(program: Program) -> tuple[Tensor, Tensor]:
    rows = [[*i, *[0] * (12 - len(i))] for i in program]
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 12)
    return table[:, :6].int().contiguous(), table[:, 6:].float().contiguous()


def direction(
    read: int,
    write: int,
    phi: Phi = Phi.AFFINE,
    first: int = 1,
    args: Sequence[float] = (0.0,),
    bias: float = 0.0,
    e: float = 0.0,
) -> tuple[float, ...]:
    a, b, c, d = [*args, 0.0, 0.0, 0.0, 0.0][:4]
    return (Opcode.DIR, read, write, phi, first, 0, a, b, c, d, bias, e)


def check_against_reference(edits: Edits) -> None:
    """Runs both on copies: what changes within tolerance, rows left alone equal bit for bit."""
    want, got, again = edits.copies(torch.float64), edits.copies(), edits.copies()
    interpreter.run_edits_(*want)
    cuda_ext.run_edits_(*got)
    run_bound(again)
    for one, other in zip(got, again, strict=True):
        rounding = 1e-5 if one is got.meter else 0  # sums over tokens, in whatever order they come
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding, equal_nan=True)
    tolerance = TOLERANCE[edits.x.dtype]
    torch.testing.assert_close(got.x.double(), want.x, **tolerance)
    torch.testing.assert_close(got.history.double(), want.history, equal_nan=True, **TOLERANCE[torch.float32])
    is_same = (want.x == edits.x.double()).all(1)
    if edits.residual is not None:
        assert want.residual is not None and got.residual is not None
        torch.testing.assert_close(got.residual.double(), want.residual, **tolerance)
        is_same &= (want.residual == edits.residual.double()).all(1)
        assert torch.equal(got.residual[is_same], edits.residual[is_same])
    assert torch.equal(got.x[is_same], edits.x[is_same])
    if edits.kept is not None:
        assert want.kept is not None and got.kept is not None
        torch.testing.assert_close(got.kept.double(), want.kept, **tolerance)
        is_left = (want.kept == edits.kept.double()).all(1)
        assert torch.equal(got.kept[is_left], edits.kept[is_left])
    begin = edits.tokens[: len(edits.x), 0]
    assert is_same[(begin < 0) | (begin >= len(edits.code))].all()
    if edits.meter is not None:
        assert want.meter is not None and got.meter is not None
        torch.testing.assert_close(got.meter.double(), want.meter, rtol=1e-5, atol=1e-5)


def bind(edits: Edits) -> Tensor:
    """A table in which it is bound for the second site of three."""
    bound = torch.zeros(3, cuda_ext.BOUND_WORDS, dtype=torch.int64)
    cuda_ext.bind_edits_(bound, 1, *edits[1:7], *edits[8:])
    return bound


def run_bound(edits: Edits) -> None:
    cuda_ext.run_bound_edits_(edits.x, edits.residual, bind(edits), 1)


NUM_LINES, NUM_FEATURES, NUM_CONDITIONS, NUM_GAINS, NUM_POSITIONS = 4, 6, 3, 2, 5


def pool(width: int) -> Tensor:
    """(14, width): scales about 1, directions of length about 1, and the directions that the encoder reads."""
    directions = strided(NUM_LINES + NUM_FEATURES, width) / width**0.5
    return torch.cat([1 + 0.3 * strided(NUM_LINES, width), directions])


def framed(program: Program, size: int, begin: int) -> Program:
    """A program that stands at `begin` in the code, with a jump after every `size` of its instructions."""
    code: Program = []
    for first in range(0, len(program), size):
        code += program[first : first + size]
        code.append((Opcode.JUMP, begin + len(code) + 1))
    return code


def any_program(random: Random, width: int) -> Program:
    """Every instruction may follow every other."""
    real = lambda: random.gauss(0, 1)  # noqa: E731
    line = lambda: random.randrange(NUM_LINES, 2 * NUM_LINES)  # noqa: E731
    condition = lambda: random.randrange(NUM_CONDITIONS)  # noqa: E731
    strides = [2**k for k in range(8) if width % 2 ** (k + 1) == 0]

    def when() -> Program:
        on = real()
        off = on - abs(real())
        return [(Opcode.WHEN, condition(), random.randrange(2), 0, 0, 0, on, off, random.choice([-1, 1]))]

    def cross() -> Program:
        return [(Opcode.CROSS, random.randrange(NUM_LINES), line(), random.choice(strides))] if strides else []

    def directions() -> Program:
        group: Program = []
        for _ in range(random.randint(1, 4)):
            phi = random.choice(list(Phi))
            if phi.is_pair and len(group) % 2:
                group.append(direction(-1, line(), Phi.OFF, 0))
            first = int(not group and random.random() < 0.5)
            for half in range(2 if phi.is_pair else 1):
                read, write = random.choice([-1, line(), line()]), random.choice([-1, line(), line()])
                args, bias = [real() for _ in range(4)], real() * random.randrange(2)
                group.append(direction(read, write, phi, 0 if half else first, args, bias, real()))
        return group

    def features() -> Program:
        first, size = random.randrange(3), random.randint(1, 4)
        active = [
            direction(2 * NUM_LINES + r, line(), Phi.TOP_K, 0, [-1.0, 0.5, 0.1]) for r in range(first, first + size)
        ]
        return [(Opcode.TOP_K, first, size, random.randint(1, 5)), *active]

    def take() -> tuple[float, ...]:
        return (Opcode.TAKE, random.choice([-1, line()]), 0, 0, 0, 0, random.choice([1.0, 0.5, real()]))

    pieces: list[Callable[[], Program]] = [
        lambda: [(Opcode.GAIN, random.randrange(-1, NUM_GAINS), 0, 0, 0, 0, random.choice([0.0, 1.0, 0.7]))],
        when,
        lambda: [(Opcode.RAMP, condition(), 0, 0, 0, 0, -1.0, 1.0, random.randrange(2), real())],
        lambda: [(Opcode.DIAG, random.randrange(-1, NUM_LINES), random.choice([-1, line()]))],
        cross,
        directions,
        lambda: [(Opcode.SAVE,), *directions(), (Opcode.RENORM,)],
        lambda: [(Opcode.PROBE, line(), condition(), random.randrange(2), random.randrange(2), 0, 0, 0, 0, 0, real())],
        lambda: [(Opcode.METER,)],
        features,
        lambda: [(Opcode.NORM_IN, random.randrange(3 if width > 8 else 1)), *directions()],
        lambda: [(Opcode.KEEP,)],
        lambda: [(Opcode.APART,), *directions()],
        lambda: [(Opcode.APART,), *directions(), *directions(), take()],
        lambda: [take()],
    ]
    return [instruction for _ in range(random.randrange(7)) for instruction in random.choice(pieces)()]


def linked(programs: list[Program]) -> tuple[Program, list[int]]:
    """One pool of code, in which every other program ends by a jump to the first END, and where each begins."""
    code: Program = [(Opcode.END,)]
    begins = []
    for program in programs:
        begins.append(len(code))
        if len(begins) == 2:
            program = framed(program, 3, len(code))
        code += [*program, (Opcode.END,) if len(begins) % 2 else (Opcode.JUMP, 0)]
    return code, begins


def any_edits(seed: int, num_tokens: int, width: int, dtype: torch.dtype) -> Edits:
    """Three programs, spread over the tokens; no token reads another's history, and some name what is not there."""
    torch.manual_seed(seed)
    random = Random(seed)
    code, begins = linked([any_program(random, width) for _ in range(3)])
    lines, num_histories = pool(width), num_tokens * NUM_CONDITIONS + 1
    begin = torch.tensor(begins)[torch.randint(0, 3, (num_tokens + 2,))]
    begin[torch.rand(len(begin)) < 0.2] = random.choice([-1, -(2**31), 2**31 - 1])
    rows = torch.randperm((num_tokens + 2) * NUM_CONDITIONS).view(-1, NUM_CONDITIONS)
    rows[torch.rand(rows.shape) < 0.1] = -1
    tokens = torch.cat([begin[:, None], torch.randint(-1, NUM_POSITIONS + 1, (len(begin), 1)), rows], 1).int()
    history = torch.where(torch.rand(num_histories, NUM_POSITIONS) < 0.2, NAN, strided(num_histories, NUM_POSITIONS))
    return Edits(
        strided(num_tokens, width, dtype),
        lines,
        *tables(code),
        tokens,
        torch.rand(len(begin), NUM_GAINS).round(decimals=1),
        history,
        random.choice([None, strided(num_tokens, width, dtype)]),
        random.choice([None, torch.zeros(2)]),
        lines[2 * NUM_LINES :].clone(),
        torch.zeros(NUM_FEATURES),
        random.choice([None, strided(num_tokens + 1, width, dtype)]),
    )


WIDTHS = (1, 2, 7, 64, 133, 192, 700, 1024)


@PROPERTY
@given(st.integers(0, 2**32), st.integers(0, 9), st.sampled_from(WIDTHS), st.sampled_from(DTYPES))
def test_any_program_matches_the_reference(seed: int, num_tokens: int, width: int, dtype: torch.dtype) -> None:
    check_against_reference(any_edits(seed, num_tokens, width, dtype))


SPECIMENS: dict[str, Program] = {
    "diag": [(Opcode.GAIN, 0, 0, 0, 0, 0, 0.5), (Opcode.DIAG, 0, 5), (Opcode.END,)],
    "add only": [(Opcode.DIAG, -1, 5), (Opcode.END,)],
    "low-rank": [*(direction(4 + r, 7 - r, Phi.AFFINE, r == 0, [0.5, 1.0]) for r in range(4)), (Opcode.END,)],
    "renorm": [(Opcode.SAVE,), (Opcode.DIAG, 1, 6), (Opcode.RENORM,), (Opcode.END,)],
    "probe": [(Opcode.PROBE, 4, 0), (Opcode.METER,), (Opcode.END,)],
    "keep": [(Opcode.KEEP,), (Opcode.DIAG, 0, 5), (Opcode.END,)],
}


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("num_tokens", BATCHES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(popularity: str, num_tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check_against_reference(batch(popularity, num_tokens, hidden, dtype))


def batch(popularity: str, num_tokens: int, hidden: int, dtype: torch.dtype) -> Edits:
    """The specimens, spread over the tokens; each token has its row of history."""
    code = [instruction for program in SPECIMENS.values() for instruction in program]
    begins = [sum(len(p) for p in list(SPECIMENS.values())[:k]) for k in range(len(SPECIMENS))]
    chosen = slots(popularity, num_tokens, len(SPECIMENS))
    begin = torch.where((chosen >= 0) & (chosen < len(begins)), torch.tensor(begins)[chosen.clamp(0, 5)], chosen)
    tokens = torch.stack([begin, torch.arange(len(begin)) % 7, torch.arange(len(begin))], 1).int()
    x, residual = strided(num_tokens, hidden, dtype), strided(num_tokens, hidden, dtype)
    gains, history = torch.rand(len(begin), 1), torch.full((len(begin), 7), NAN)
    kept = strided(num_tokens, hidden, dtype)
    return Edits(x, pool(hidden), *tables(code), tokens, gains, history, residual, torch.zeros(2), kept=kept)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_share_the_tokens(num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        check_against_reference(batch("zipf", 133, 4096, torch.bfloat16))
    finally:
        torch.set_num_threads(before)


def run(
    program: Program,
    x: Rows,
    lines: Rows | None = None,
    gains: Rows | None = None,
    past: Rows | None = None,
    position: int = 0,
    encoder: Rows | None = None,
    bias: list[float] | None = None,
    meter: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Rows, Rows]:
    """All tokens run one program; condition j of each is row j of `past`. What x and `past` become."""
    rows, table = torch.tensor(x), torch.tensor(lines or x)
    history = torch.tensor(past if past is not None else [[NAN]])
    tokens = torch.tensor([[0, position, *range(len(history))]] * len(x), dtype=torch.int32)
    cuda_ext.run_edits_(
        rows,
        table,
        *tables(program),
        tokens,
        torch.tensor(gains) if gains else torch.ones(len(x), 0),
        history,
        None,
        meter,
        None if encoder is None else torch.tensor(encoder),
        None if bias is None else torch.tensor(bias),
        kept,
    )
    return rows.tolist(), history.tolist()


def test_hand_worked_diagonals() -> None:
    x, lines = [[1.0, 2.0], [3.0, 4.0]], [[2.0, 0.5], [1.0, 1.0]]
    assert run([(Opcode.DIAG, 0, 1)], x, lines)[0] == [[3.0, 2.0], [7.0, 3.0]]
    assert run([(Opcode.DIAG, 0, -1)], x, lines)[0] == [[2.0, 1.0], [6.0, 2.0]]
    assert run([(Opcode.DIAG, -1, 1)], x, lines)[0] == [[2.0, 3.0], [4.0, 5.0]]
    assert run([(Opcode.GAIN, 0, 0, 0, 0, 0, 2.0), (Opcode.DIAG, -1, 1)], x, lines, [[0.5], [1.0]])[0] == [
        [2.0, 3.0],
        [5.0, 6.0],
    ]
    assert run([(Opcode.DIAG, 0, 1), (Opcode.DIAG, 0, 1)], x, lines)[0] == [[7.0, 2.0], [15.0, 2.5]]
    assert run([(Opcode.JUMP, 2), (Opcode.END,), (Opcode.DIAG, -1, 1), (Opcode.END,), (Opcode.DIAG, -1, 1)], x, lines)[
        0
    ][0] == [2.0, 3.0]


def test_hand_worked_crossing() -> None:
    quarter_turn: Program = [(Opcode.CROSS, 0, 1, 2)]
    lines = [[0.0, 0.0, 0.0, 0.0], [-1.0, -1.0, 1.0, 1.0]]
    assert run(quarter_turn, [[1.0, 2.0, 3.0, 4.0]], lines)[0] == [[-3.0, -4.0, 1.0, 2.0]]
    half = [(Opcode.GAIN, -1, 0, 0, 0, 0, 0.5), *quarter_turn]
    assert run(half, [[1.0, 2.0, 3.0, 4.0]], lines)[0] == [[-1.0, -1.0, 2.0, 3.0]]


AXES = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]


def test_directions_of_a_group_read_the_same_row() -> None:
    one, other = direction(0, 1, args=[1.0]), direction(1, 0, args=[1.0], first=0)
    assert run([one, other], [[1.0, 2.0]], AXES)[0] == [[3.0, 3.0]]
    assert run([one, direction(1, 0, args=[1.0])], [[1.0, 2.0]], AXES)[0] == [[4.0, 3.0]]
    assert run([one, (Opcode.GAIN, -1, 0, 0, 0, 0, 1.0), other], [[1.0, 2.0]], AXES)[0] == [[4.0, 3.0]]
    assert run([direction(-1, 0, args=[2.0], bias=3.0)], [[1.0, 2.0]], AXES)[0] == [[7.0, 2.0]]
    assert run([direction(0, -1, args=[2.0])], [[1.0, 2.0]], AXES)[0] == [[1.0, 2.0]]


def test_a_group_goes_on_behind_a_jump() -> None:
    """Tables cut long programs into frames: a group, and a pair, may lie in two of them."""
    one, other = direction(0, 1, args=[1.0]), direction(1, 0, args=[1.0], first=0)
    assert run([one, (Opcode.JUMP, 3), (Opcode.END,), other], [[1.0, 2.0]], AXES)[0] == [[3.0, 3.0]]
    assert run([one, (Opcode.JUMP, 3), (Opcode.END,), direction(1, 0, args=[1.0])], [[1.0, 2.0]], AXES)[0] == [
        [4.0, 3.0]
    ]
    quarter = [direction(r, r, Phi.ROTATE, r == 0, [math.pi / 2]) for r in range(2)]
    turned = run([quarter[0], (Opcode.JUMP, 3), (Opcode.END,), quarter[1], (Opcode.END,)], [[1.0, 2.0]], AXES)[0][0]
    assert turned == pytest.approx([-2.0, 1.0], abs=1e-6)
    framed: Program = []
    for _ in range(128):  # as many as two groups hold, each with a jump to the next
        framed += [direction(0, 0, args=[1.0 / 64], first=0), (Opcode.JUMP, len(framed) + 2)]
    assert run(framed, [[1.0, 0.0]], AXES)[0] == [[4.0, 0.0]]
    add = (Opcode.DIAG, -1, 1)
    assert run([one, (Opcode.JUMP, 2), add], [[1.0, 2.0]], AXES)[0] == [[1.0, 4.0]]


def test_a_group_ends_after_64_directions() -> None:
    many = [direction(0, 0, args=[1.0 / 64], first=0) for _ in range(128)]
    assert run(many, [[1.0, 0.0]], AXES)[0] == [[4.0, 0.0]]


TAKE = (Opcode.TAKE, -1, 0, 0, 0, 0, 1.0)


def test_directions_apart_read_the_same_row_and_take_its_place() -> None:
    x, ones = [[1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    swapped = [direction(0, 1, args=[1.0]), direction(1, 0, args=[1.0])]  # two groups
    assert run([(Opcode.APART,), *swapped, TAKE], x, ones)[0] == [[2.0, 1.0]]
    assert run([(Opcode.APART,), *swapped, (Opcode.TAKE, 2, 0, 0, 0, 0, 1.0)], x, ones)[0] == [[3.0, 2.0]]
    assert run([(Opcode.APART,), *swapped, (Opcode.TAKE, 2, 0, 0, 0, 0, 0.5)], x, ones)[0] == [[2.0, 2.0]]
    half = (Opcode.GAIN, -1, 0, 0, 0, 0, 0.5)
    assert run([half, (Opcode.APART,), *swapped, TAKE], x, ones)[0] == [[1.5, 1.5]]
    assert run([(Opcode.APART,), *swapped, TAKE, swapped[0]], x, ones)[0] == [[2.0, 3.0]]  # h again
    assert run([(Opcode.APART,), *swapped, (Opcode.APART,), TAKE], x, ones)[0] == [[0.0, 0.0]]
    assert run([TAKE], x, ones)[0] == [[0.0, 0.0]]
    many = [direction(0, 0, args=[1.0], first=0) for _ in range(150)]
    assert run([(Opcode.APART,), *many, TAKE], x, ones)[0] == [[150.0, 0.0]]


def test_what_takes_a_normed_rows_place_is_scaled_back() -> None:
    take, read = (Opcode.TAKE, 1, 0, 0, 0, 0, 1.0), direction(0, 0, args=[1.0])
    back = 5 / 2**0.5
    assert run([(Opcode.NORM_IN, 1), (Opcode.APART,), read, take], [[3.0, 4.0]], AXES)[0][0] == pytest.approx(
        [3.0, back]
    )
    row = run([(Opcode.NORM_IN, 2), (Opcode.APART,), read, take], [[3.0, 5.0]], AXES)[0][0]
    assert row == pytest.approx([4.0 + 2**0.5 * 3.0 / (2**0.5 + 1e-5), 4.0 + 2**0.5])


def along_axes(x: list[float], phi: Phi, args: list[float], rank: int = 1) -> list[float]:
    """One token of two columns, read and written along the first or along both axes."""
    return run([direction(r, r, phi, r == 0, args) for r in range(rank)], [x], AXES)[0][0]


def test_hand_worked_readings() -> None:
    assert along_axes([3.0, 5.0], Phi.OFF, [9.0]) == [3.0, 5.0]
    assert along_axes([3.0, 5.0], Phi.AFFINE, [-1.0, 0.5]) == [0.5, 5.0]
    assert along_axes([3.0, 5.0], Phi.SET, [-6.0]) == [-6.0, 5.0]
    assert along_axes([3.0, 5.0], Phi.CLAMP, [-1.0, 2.0]) == [2.0, 5.0]
    assert along_axes([-3.0, 5.0], Phi.CLAMP, [-1.0, 2.0]) == [-1.0, 5.0]
    for gated in (Phi.GATED, Phi.TOP_K):  # the same where no TOP_K instruction has compared readings
        assert along_axes([3.0, 5.0], gated, [2.0, -1.0, 10.0, 7.0]) == [10.0, 5.0]
        assert along_axes([2.0, 5.0], gated, [2.0, -1.0, 10.0, 7.0]) == [9.0, 5.0]
    assert along_axes([-3.0, 5.0], Phi.SIGN, [2.0]) == [-5.0, 5.0]
    assert along_axes([0.5, 5.0], Phi.TANH, [2.0])[0] == pytest.approx(0.5 + 2 * math.tanh(0.5))
    assert along_axes([0.5, 5.0], Phi.SILU, [2.0])[0] == pytest.approx(0.5 + 2 * 0.5 / (1 + math.exp(-0.5)))


def test_hand_worked_pairs() -> None:
    quarter = math.pi / 2
    assert along_axes([3.0, 4.0], Phi.ANGLE, [quarter, -math.inf], rank=2) == pytest.approx([0.0, 5.0], abs=1e-6)
    assert along_axes([3.0, 4.0], Phi.ANGLE, [quarter, 3.5], rank=2) == [3.0, 4.0]
    assert along_axes([3.0, 4.0], Phi.ROTATE, [quarter], rank=2) == pytest.approx([-4.0, 3.0], abs=1e-6)


def test_ablating_a_direction_removes_it() -> None:
    x, line = torch.randn(6, 512), torch.nn.functional.normalize(torch.randn(1, 512), dim=1)
    program, tokens = tables([direction(0, 0, Phi.SET)]), torch.zeros(6, 2, dtype=torch.int32)
    cuda_ext.run_edits_(x, line, *program, tokens, torch.ones(6, 0), torch.ones(0, 0))
    torch.testing.assert_close(x @ line[0], torch.zeros(6), rtol=0, atol=1e-5)


def test_pairs_begin_at_even_offsets() -> None:
    turn = [direction(0, 0, Phi.ROTATE, 1, [math.pi / 2]), direction(1, 1, Phi.ROTATE, 0)]
    assert run(turn, [[3.0, 4.0]], AXES)[0][0] == pytest.approx([-4.0, 3.0], abs=1e-6)
    assert run([direction(-1, -1, Phi.OFF, 1), (Opcode.SAVE,), *turn], [[3.0, 4.0]], AXES)[0][0] == pytest.approx(
        [-4.0, 3.0], abs=1e-6
    )
    assert run(turn[:1], [[3.0, 4.0]], AXES)[0] == [[3.0, 4.0]]  # half a pair does nothing


def test_conditions_keep_their_state_between_two_thresholds() -> None:
    past = [[0.0, 3.0, 1.5, 1.5, 0.5, 1.5, NAN, 1.5, 9.0]]
    program = [(Opcode.WHEN, 0, 0, 0, 0, 0, 2.0, 1.0, 1.0), (Opcode.DIAG, -1, 0)]
    on = [run(program, [[0.0]], [[1.0]], past=past, position=q)[0][0][0] for q in range(-1, 10)]
    assert on == [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0]
    below = [(Opcode.WHEN, 0, 0, 0, 0, 0, -1.0, -1.0, -1.0), (Opcode.DIAG, -1, 0)]
    assert [run(below, [[0.0]], [[1.0]], past=past, position=q)[0][0][0] for q in range(7)] == [1, 0, 0, 0, 1, 0, 0]


def test_a_latched_condition_looks_at_the_first_reading() -> None:
    latched = [(Opcode.WHEN, 0, 1, 0, 0, 0, 2.0, 1.0, 1.0), (Opcode.DIAG, -1, 0)]
    for first, expected in ((3.0, 1.0), (1.5, 0.0), (NAN, 0.0)):
        assert run(latched, [[0.0]], [[1.0]], past=[[first, 9.0]], position=1)[0] == [[expected]]


def test_ramps() -> None:
    program = [(Opcode.RAMP, 0, 0, 0, 0, 0, 1.0, 3.0, 0.5, 1.5), (Opcode.DIAG, -1, 0)]
    gains = [run(program, [[0.0]], [[1.0]], past=[[v]])[0][0][0] for v in (0.0, 1.0, 2.0, 3.0, 9.0, NAN)]
    assert gains == [0.5, 0.5, 1.0, 1.5, 1.5, 0.5]


def test_a_probe_is_seen_by_the_same_program() -> None:
    probe, when = (Opcode.PROBE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5), (Opcode.WHEN, 0, 0, 0, 0, 0, 3.0, 3.0, 1.0)
    got, past = run([probe, when, (Opcode.DIAG, -1, 1)], [[3.0, 4.0], [2.0, 4.0]], AXES, past=[[NAN]])
    assert got[0] == [3.0, 5.0]
    assert run([probe, when, (Opcode.DIAG, -1, 1)], [[2.0, 4.0]], AXES, past=[[NAN]]) == ([[2.0, 4.0]], [[2.5]])
    cosine = (Opcode.PROBE, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1.0)
    assert run([cosine], [[3.0, 4.0]], AXES, past=[[NAN, 7.0]], position=1)[1] == [[pytest.approx(1.6), 7.0]]
    assert len(past) == 1


def test_lengths() -> None:
    program: Program = [(Opcode.SAVE,), (Opcode.DIAG, 0, -1), (Opcode.METER,), (Opcode.RENORM,)]
    meter = torch.tensor([1.0, 1.0])
    assert run(program, [[3.0, 4.0]], [[0.0, 2.0]], meter=meter)[0] == [[0.0, 5.0]]
    assert meter.tolist() == [9.0, 2.0]
    assert run(program, [[3.0, 4.0]], [[0.0, 0.0]])[0] == [[0.0, 0.0]]


def test_what_is_kept_is_the_row_as_it_stands_then() -> None:
    edit, keep, x = (Opcode.DIAG, -1, 0), (Opcode.KEEP,), [[1.0, 2.0], [3.0, 4.0]]
    cases: list[tuple[Program, list[float]]] = [
        ([keep], [3.0, 4.0]),
        ([keep, edit], [3.0, 4.0]),
        ([edit, keep, edit], [4.0, 6.0]),
    ]
    for program, row in cases:
        kept = torch.zeros(2, 2)
        assert run(program, x, kept=kept)[0][1] == [3.0 + program.count(edit), 4.0 + 2 * program.count(edit)]
        assert kept.tolist()[1] == row
    assert run([keep], x)[0] == x  # nowhere to keep it


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_is_what_the_next_block_sees(dtype: torch.dtype) -> None:
    x, residual, kept = strided(9, 96, dtype), strided(9, 96, dtype), strided(11, 96, dtype)
    before, tokens = kept.clone(), torch.zeros(9, 2, dtype=torch.int32)
    tokens[::2, 0] = -1
    cuda_ext.run_edits_(
        x, pool(96), *tables([(Opcode.KEEP,)]), tokens, torch.ones(9, 0), torch.ones(0, 0), residual, kept=kept
    )
    assert torch.equal(kept[1:9:2], (x + residual)[1::2])
    assert torch.equal(kept[:9:2], before[:9:2])
    assert torch.equal(kept[9:], before[9:])


def test_readings_of_a_normed_row() -> None:
    read = direction(0, 1, args=[1.0], bias=0.5, e=2.0)
    constant = run([(Opcode.NORM_IN, 1), read], [[3.0, 4.0]], AXES)[0][0]
    assert constant == pytest.approx([3.0, 4.0 + 5 / 2**0.5 * (3.0 * 2**0.5 / 5 + 0.5)])
    layer = run([(Opcode.NORM_IN, 2), read], [[3.0, 5.0]], AXES)[0][0]
    assert layer == pytest.approx([3.0, 5.0 + 2**0.5 * ((3.0 - 4.0 * 2.0) / (2**0.5 + 1e-5) + 0.5)])
    assert run([(Opcode.NORM_IN, 2), (Opcode.NORM_IN, 0), read], [[3.0, 5.0]], AXES)[0] == [[3.0, 8.5]]
    assert run([(Opcode.NORM_IN, 1), read], [[0.0, 0.0]], AXES)[0] == [[0.0, 0.0]]


def test_only_the_largest_features_are_active() -> None:
    encoder = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    features = [direction(r, r, Phi.TOP_K, 0, [0.5, 1.0, 0.0, 0.0], bias=0.25) for r in range(3)]
    x = [[1.0, 2.0]]
    for k, expected in ((1, [4.25, 5.25]), (2, [4.25, 7.5]), (3, [5.5, 7.5])):
        assert run([(Opcode.TOP_K, 0, 3, k), *features], x, AXES, encoder=encoder, bias=[0.25] * 3)[0] == [expected]
    assert run([(Opcode.TOP_K, 0, 3, 1), *features], x, AXES)[0] == [[5.5, 7.5]]  # without an encoder all may be


@pytest.mark.parametrize("width", [5, 64, 133, 1000, 4096])
def test_the_kth_feature_is_among_the_largest_bit_for_bit(width: int) -> None:
    for k in (1, 3, 16):
        lines = strided(17, width)
        features = [direction(r, 16, Phi.TOP_K, 0, [-math.inf, 0.0, 1.0]) for r in range(16)]
        code, args = tables([(Opcode.TOP_K, 0, 16, k), *features])
        x, tokens = strided(9, width), torch.zeros(9, 2, dtype=torch.int32)
        want = x + k * lines[16]
        cuda_ext.run_edits_(x, lines, code, args, tokens, torch.ones(9, 0), torch.ones(0, 0), encoder=lines.clone())
        torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-4)


UNCHANGING: dict[str, Program] = {
    "readings": [
        (Opcode.PROBE, 4, 0),
        (Opcode.METER,),
        (Opcode.SAVE,),
        (Opcode.RENORM,),
        (Opcode.NORM_IN, 2),
        (Opcode.TOP_K, 0, 2, 1),
    ],
    "keeping": [(Opcode.KEEP,), (Opcode.SAVE,), (Opcode.RENORM,)],
    "gain 0": [(Opcode.GAIN, -1), (Opcode.DIAG, 0, 4), (Opcode.CROSS, 0, 4, 1), direction(4, 5, args=[1.0])],
    "a gain of 0": [(Opcode.GAIN, 0, 0, 0, 0, 0, 1.0), (Opcode.DIAG, 0, 4)],
    "never met": [(Opcode.WHEN, 0, 0, 0, 0, 0, 1.0, 1.0, 1.0), (Opcode.DIAG, 0, 4), (Opcode.SAVE,), (Opcode.RENORM,)],
    "apart": [(Opcode.APART,), direction(4, 5, args=[1.0])],
    "nothing taken": [(Opcode.APART,), direction(4, 5, args=[1.0]), (Opcode.TAKE, 4)],
    "gain 0, apart": [
        (Opcode.GAIN, -1),
        (Opcode.APART,),
        direction(4, 5, args=[1.0]),
        (Opcode.TAKE, 4, 0, 0, 0, 0, 1.0),
    ],
    "closed gates": [direction(4, 5, Phi.GATED, 0, [math.inf, 1.0, 1.0]), direction(4, 5, Phi.OFF)],
    "nothing": [],
    "neither mul nor add": [(Opcode.DIAG, -1, -1)],
}


@pytest.mark.parametrize("name", UNCHANGING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_changes_nothing_leaves_every_bit(name: str, dtype: torch.dtype) -> None:
    x, residual = strided(4, 132, dtype), strided(4, 132, dtype)
    before, tokens = (x.clone(), residual.clone()), torch.tensor([[0, 0, 0]] * 4, dtype=torch.int32)
    history, encoder = torch.full((1, 1), NAN), torch.randn(2, 132)
    program = tables(UNCHANGING[name])
    meter, bias, kept = torch.zeros(2), torch.ones(2), torch.zeros(4, 132, dtype=dtype)
    cuda_ext.run_edits_(
        x, pool(132), *program, tokens, torch.zeros(4, 1), history, residual, meter, encoder, bias, kept
    )
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_diagonal_program_rounds_like_torch(dtype: torch.dtype) -> None:
    x, residual, lines = strided(50, 1029, dtype), strided(50, 1029, dtype), strided(2, 1029)
    want = ((x.float() + residual.float()) * lines[0] + lines[1]).to(dtype)
    tokens = torch.zeros(50, 2, dtype=torch.int32)
    program = tables([(Opcode.DIAG, 0, 1)])
    cuda_ext.run_edits_(x, lines, *program, tokens, torch.ones(50, 0), torch.ones(0, 0), residual)
    assert torch.equal(x, want)
    assert not residual.any()


@pytest.mark.parametrize("special", [math.inf, NAN, 1e30, 7e4, 1e-7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_and_special_values_round_like_torch(dtype: torch.dtype, special: float) -> None:
    x, lines = torch.tensor([[special, -special, 1.0, 0.1]]).to(dtype), torch.tensor([[3.0] * 4, [1e-8] * 4])
    want = (x.float() * 3.0 + 1e-8).to(dtype)
    tokens, program = torch.zeros(1, 2, dtype=torch.int32), tables([(Opcode.DIAG, 0, 1)])
    cuda_ext.run_edits_(x, lines, *program, tokens, torch.ones(1, 0), torch.ones(0, 0))
    assert torch.equal(x.nan_to_num(123.0), want.nan_to_num(123.0))


def test_what_tokens_name_but_is_not_there_is_harmless() -> None:
    x, history = torch.ones(4, 8), torch.full((2, 3), NAN)
    tokens = torch.tensor([[9, 0, 0], [0, 99, 1], [0, 1, 2**31 - 1], [0, -(2**31), 0]], dtype=torch.int32)
    program = tables([(Opcode.PROBE, 0, 0), (Opcode.WHEN, 0), (Opcode.DIAG, 0, 0)])
    cuda_ext.run_edits_(x, torch.ones(1, 8), *program, tokens, torch.ones(4, 0), history)
    assert torch.equal(x, torch.ones(4, 8))
    assert history.isnan().all()


def test_a_program_in_circles_ends() -> None:
    assert run([(Opcode.DIAG, -1, 0), (Opcode.JUMP, 0)], [[0.0]], [[1.0]])[0] == [[1.0]]


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_empty_batches(shape: tuple[int, int]) -> None:
    tokens, program = (
        torch.zeros(4, 2, dtype=torch.int32),
        tables([(Opcode.SAVE,), (Opcode.DIAG, 0, 0), (Opcode.RENORM,)]),
    )
    cuda_ext.run_edits_(
        torch.ones(shape), torch.ones(1, shape[1]), *program, tokens, torch.ones(4, 0), torch.ones(0, 0)
    )
    none = tables([])
    cuda_ext.run_edits_(torch.ones(shape), torch.ones(0, shape[1]), *none, tokens, torch.ones(4, 0), torch.ones(0, 0))


FINE = Edits(
    torch.ones(4, 8),
    torch.ones(3, 8),
    torch.zeros(2, 6, dtype=torch.int32),
    torch.zeros(2, 6),
    torch.zeros(4, 3, dtype=torch.int32),
    torch.ones(4, 1),
    torch.ones(2, 5),
)
REFUSED = {
    "x must be float32, bfloat16 or float16, not Double": {"x": FINE.x.double()},
    "x must be contiguous in its last dimension, not stride 2": {"x": torch.ones(4, 16)[:, ::2]},
    "lines has 7 columns, not 8": {"lines": FINE.lines[:, 1:]},
    "lines must be Float, not Half": {"lines": FINE.lines.half()},
    "code must be Int, not Long": {"code": FINE.code.long()},
    "code has 5 columns, not 6": {"code": FINE.code[:, 1:]},
    "args must be contiguous": {"args": torch.zeros(2, 7)[:, 1:]},
    "code has 2 rows, args has 1": {"args": FINE.args[1:]},
    "tokens has 1 columns, at least 2 are needed": {"tokens": FINE.tokens[:, :1]},
    "tokens has 3 rows, 4 are needed": {"tokens": FINE.tokens[1:]},
    "gains has 3 rows, 4 are needed": {"gains": FINE.gains[1:]},
    "history must be Float, not Double": {"history": FINE.history.double()},
    r"residual has shape \[3, 8\], x has \[4, 8\]": {"residual": FINE.x[1:]},
    "residual must be Float, not Half": {"residual": FINE.x.half()},
    "meter has 1 entries for 2 rows": {"meter": torch.zeros(1)},
    "encoder has 7 columns, not 8": {"encoder": FINE.lines[:, 1:]},
    "encoder_bias has 2 entries for 3 rows": {"encoder": FINE.lines, "encoder_bias": torch.zeros(2)},
    "encoder_bias comes without an encoder": {"encoder_bias": torch.zeros(2)},
    "kept has 3 rows, 4 are needed": {"kept": FINE.x[1:]},
    "kept has 7 columns, not 8": {"kept": FINE.x[:, 1:]},
    "kept must be Float, not Half": {"kept": FINE.x.half()},
}


@pytest.mark.parametrize("run", [lambda edits: cuda_ext.run_edits_(*edits), run_bound])
@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_the_tensor(message: str, run: Callable[[Edits], None]) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(FINE._replace(**REFUSED[message]))


@pytest.mark.parametrize(
    ("table", "site", "message"),
    [
        (bind(FINE), 3, r"site 3 is outside \[0, 3\)"),
        (bind(FINE), -1, r"site -1 is outside \[0, 3\)"),
        (bind(FINE), 0, "nothing was bound for site 0"),
        (bind(FINE)[:, 1:], 1, "bound must have rows of 40 Long on the CPU"),
        (bind(FINE).double(), 1, "bound must have rows of 40 Long on the CPU"),
    ],
)
def test_what_was_not_bound_is_refused(table: Tensor, site: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cuda_ext.run_bound_edits_(FINE.x, None, table, site)


def test_what_is_bound_is_read_when_it_runs() -> None:
    """Programs, lines and tokens come and go in the same places."""
    tokens = torch.full((4, 2), -1, dtype=torch.int32)
    code, args = tables([(Opcode.DIAG, -1, 0)])
    edits = Edits(torch.ones(4, 8), torch.zeros(1, 8), code, args, tokens, torch.ones(4, 0), torch.ones(0, 0))
    bound = bind(edits)
    cuda_ext.run_bound_edits_(edits.x, None, bound, 1)
    assert edits.x.sum() == 32
    tokens[2, 0], edits.lines[0] = 0, 3.0
    cuda_ext.run_bound_edits_(edits.x[:3], None, bound, 1)
    assert edits.x.sum(1).tolist() == [8.0, 8.0, 8.0 + 24.0, 8.0]
