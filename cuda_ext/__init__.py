"""The compiled operators: typed functions over torch.ops.whipstaff, and the choice of what runs behind them.

CPU tensors go to the C++ library, CUDA tensors to the CUDA library. Nothing falls back silently: a library that is
missing raises here, and the pure-torch reference runs only when WHIPSTAFF_CUDA_EXT=reference asks for it.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from whipstaff.cuda_ext.instructions import MAX_GROUP, Opcode, Phi, described
from whipstaff.cuda_ext.libraries import load

__all__ = [
    "BOUND_WORDS",
    "IMPLEMENTATION",
    "MAX_GROUP",
    "Explanation",
    "Opcode",
    "Phi",
    "apply_temperature_",
    "attention_rows",
    "bind_edits_",
    "cut_rows_",
    "divergences",
    "explain_rows",
    "mix_logits_",
    "put_rows_",
    "run_bound_edits_",
    "run_edits_",
    "typical_rows_",
]

BOUND_WORDS = 40
"""The width of a table of `bind_edits_`."""

IMPLEMENTATION = load()
"""Which code runs: "cpu", "cpu+cuda" or "reference"; for the start-up log."""

_put_rows_ = torch.ops.whipstaff.put_rows_.default
_run_edits_ = torch.ops.whipstaff.run_edits_.default
_bind_edits_ = torch.ops.whipstaff.bind_edits_.default
_run_bound_edits_ = torch.ops.whipstaff.run_bound_edits_.default
_mix_logits_ = torch.ops.whipstaff.mix_logits_.default
_apply_temperature_ = torch.ops.whipstaff.apply_temperature_.default
_explain_rows = torch.ops.whipstaff.explain_rows.default
_divergences = torch.ops.whipstaff.divergences.default
_cut_rows_ = torch.ops.whipstaff.cut_rows_.default
_typical_rows_ = torch.ops.whipstaff.typical_rows_.default
_attention_rows = torch.ops.whipstaff.attention_rows.default


def put_rows_(x: Tensor, rows: Tensor, index: Tensor) -> None:
    """x[t] <- rows[index[t]] where index[t] names a row; every other token is left alone, bit for bit.

    x       (T, H) float32, bfloat16 or float16, changed in place; rows may be strided
    rows    (N, H) of x's type
    index   (>= T,) int32, the first T are used; outside [0, N) = leave alone
    """
    _put_rows_(x, rows, index)


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
    """Runs on each row h = x[t] (+ residual[t]) the program that begins at code[tokens[t, 0]].

    Where the program changes h: x[t] <- h, residual[t] <- 0; every other token is left alone, bit for bit. Registers:
    h, kept in float32; g, u_in, u_out = 1; mean = 0; tau = -inf; saved = 0. With [op, i0, i1, i2, ..] from `code` and
    a, b, c, d, bias, e from `args`, L = lines, H = history[tokens[t, 2 + j]] (NaN = not read), q = tokens[t, 1]:

    {instructions}

    Where g is 0, DIAG, CROSS and DIR change nothing. A token sees its own PROBEs; what it sees of other tokens' PROBEs
    in the same call is not defined. Program positions outside `code`, history rows outside `history` and positions
    outside its columns are harmless (not read, not written); the indices in `code` are trusted outside checked mode.

    x, residual   (T, W) float32, bfloat16 or float16, changed in place; rows may be strided
    lines         (N, W) float32, the rows that programs refer to
    code, args    (P, 6) int32 and (P, 6) float32
    tokens        (>= T, 2 + J) int32: where the program begins (negative = leave alone), the absolute position, and the
                  history row of each condition j (-1 = none); the first T rows are used
    gains         (>= T, K) float32
    history       (R, M) float32, changed in place
    meter         (2,) float32, changed in place, or None
    encoder, encoder_bias   (E, W) and (E,) float32, or None
    kept          (>= T, W) of x's type, changed in place, or None
    """
    _run_edits_(x, lines, code, args, tokens, gains, history, residual, meter, encoder, encoder_bias, kept)


run_edits_.__doc__ = (run_edits_.__doc__ or "").replace("    {instructions}", described(indent=4))


def bind_edits_(
    bound: Tensor,
    site: int,
    lines: Tensor,
    code: Tensor,
    args: Tensor,
    tokens: Tensor,
    gains: Tensor,
    history: Tensor,
    meter: Tensor | None = None,
    encoder: Tensor | None = None,
    encoder_bias: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """bound[site] <- where all that is that `run_edits_` takes beside the activations, so that `run_bound_edits_` asks
    nothing about it any more.

    bound   (S, BOUND_WORDS) int64 in the host's memory, changed in place. It holds addresses: whoever keeps it keeps
            the tensors
    """
    _bind_edits_(bound, site, lines, code, args, tokens, gains, history, meter, encoder, encoder_bias, kept)


def run_bound_edits_(x: Tensor, residual: Tensor | None, bound: Tensor, site: int) -> None:
    """`run_edits_` with what was bound for a site, a fraction of its cost where there is little to do.

    That `history`, `meter` and `kept` change is not said: in one graph nobody else may read them.

    x, residual   as there, changed in place
    bound         (S, BOUND_WORDS) int64 in the host's memory, of `bind_edits_`
    """
    _run_bound_edits_(x, residual, bound, site)


def mix_logits_(
    out: Tensor,
    streams: list[Tensor],
    rows: Tensor,
    weights: Tensor,
    temperatures: Tensor | None = None,
    log_softmax: Tensor | None = None,
    alphas: Tensor | None = None,
    top_ps: Tensor | None = None,
    num_allowed: Tensor | None = None,
) -> None:
    """out[r] <- sum over k of weights[r, k] * f(streams[k][rows[r, k]])   where rows[r, 0] names a row.

    f(x) = x / temperatures[r, k], or log_softmax(x / temperatures[r, k]) where log_softmax[r, k]. A token is allowed
    if no stream that row r uses holds -inf there and each stream k with a mask admits it: its logit is at least
    log(alphas[r, k]) + the row's best, and the mass of the tokens above it is at most top_ps[r, k]. Masks look at the
    untempered stream; all other tokens become -inf. Where the masks leave nothing, the best token of stream 0, the
    main one, stays. Rows with rows[r, 0] = -1 are left alone. A stream is not used where rows[r, k] is -1, or where
    its weight is 0 and it has no mask; the main stream's own -inf count always.

    out           (R, V) float32, bfloat16 or float16, changed in place; may be one of the streams, as long as a row
                  that is written is read by no other row: streams[0] with rows[r, 0] = r
    streams       1 to 8 of (R_k, >= V) each of any such type; columns from V on are not read
    rows          (>= R, K) int32 or int64
    weights, temperatures, alphas, top_ps   (>= R, K) float32; None = temperature 1, alpha 0 (off), top-p 1 (off)
    log_softmax   (>= R, K) bool; None = raw logits
    num_allowed   (>= R,) int32, set for mixed rows: how many tokens the masks and bans left, or None
    """
    _mix_logits_(out, streams, rows, weights, temperatures, log_softmax, alphas, top_ps, num_allowed)


def apply_temperature_(logits: Tensor, temperature: Tensor) -> None:
    """logits[r] <- logits[r] / temperature[r];  at 0 the first best token keeps its logit and all others become -inf.

    logits        (R, V) float32, bfloat16 or float16, changed in place; rows may be strided
    temperature   (>= R,) float32; 1 and anything below 0 leave the row alone, bit for bit
    """
    _apply_temperature_(logits, temperature)


class Explanation(NamedTuple):
    """How rows of logits differ from others, as distributions."""

    entropy: Tensor  # (R,) of softmax(final), in nats
    divergence: Tensor  # (R,) KL(softmax(final) || softmax(base)) in nats, inf where base bans what final allows


def explain_rows(final: Tensor, base: Tensor | None = None) -> Explanation:
    """Entropy of each row of `final`, and what sets it apart from the same row of `base`.

    final   (R, V) float32, bfloat16 or float16
    base    (R, >= V) likewise; without it the divergence reads 0
    """
    return Explanation(*_explain_rows(final, base))


def divergences(mature: Tensor, early: Tensor, owners: Tensor) -> Tensor:
    """out[p] = half of KL(m || q) + KL(m || e), where q = softmax(mature[owners[p]]), e = softmax(early[p]) and
    m = (q + e) / 2;  0 where owners names no row.

    A token that the mature row bans (-inf) counts for nothing.

    mature    (R, V) float32, bfloat16 or float16
    early     (P, >= V) likewise; columns from V on are not read
    owners    (>= P,) int64
    returns   (P,) float32, in nats
    """
    return cast(Tensor, _divergences(mature, early, owners))


def cut_rows_(logits: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> None:
    """logits[r] <- -inf for every token whose logit is below low[r] or above high[r].

    logits      (R, V) float32, bfloat16 or float16, changed in place; rows may be strided
    low, high   (>= R,) float32, or None; NaN is no bound
    """
    _cut_rows_(logits, low, high)


def typical_rows_(logits: Tensor, mass: Tensor) -> None:
    """logits[r] <- -inf for every token outside the locally typical set: the tokens whose surprise is closest to the
    expected one, as few as have that mass (Meister et al. 2022, arXiv:2202.00666).

    A token deviates by |-log p - H| nats, H = -sum p log p. The row's limit is the least deviation such that the tokens
    up to it have mass[r]; tokens that deviate as much stay with it. Masses are counted in whole 2^-40, so that no order
    of adding matters. At least one token stays, and what is banned (-inf) stays banned.

    logits   (R, V) float32, bfloat16 or float16, changed in place; rows may be strided
    mass     (>= R,) float32; 1 and anything above leave the row alone, bit for bit
    """
    _typical_rows_(logits, mass)


def attention_rows(
    query: Tensor,
    keys: Tensor,
    block_table: Tensor,
    context: Tensor,
    scale: float,
    max_context: int,
    head_max: bool = False,
) -> Tensor:
    """out[r, h, j] = softmax over j < context[r] of scale * query[r, h] . key(r, h, j);  0 from context[r] on.

    key(r, h, j) = keys[block_table[r, j // block_size], j % block_size, h // (num_heads / num_kv_heads)]; a position
    whose block is outside [0, num_blocks) has no key and gets probability 0.

    query         (R, num_heads, D) float32, bfloat16 or float16, after rotary embedding
    keys          (num_blocks, block_size, num_kv_heads, D) of query's type; all may have any strides, so other cache
                  layouts are views, and plain keys are one block per row
    block_table   (>= R, max_blocks) int32
    context       (>= R,) int32: how many keys each row sees, its own included
    returns       (R, num_heads, max_context) float32, or with `head_max` the (R, max_context) maximum over heads
    """
    return cast(Tensor, _attention_rows(query, keys, block_table, context, scale, max_context, head_max))
