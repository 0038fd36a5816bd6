"""The operators in plain torch: what the compiled kernels must equal, and what runs when asked for by name."""

import os

import torch
from torch import Tensor

from whipstaff.cuda_ext.instructions import Phi

WHOLE_MASS = 2.0**40  # sums of whole numbers do not depend on their order
IS_CHECKED = os.environ.get("WHIPSTAFF_CUDA_EXT_CHECKED") == "1"


def compute_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def put_rows_(x: Tensor, rows: Tensor, index: Tensor) -> None:
    chosen = index[: len(x)]
    if IS_CHECKED:
        _check_index(chosen, len(rows))
    tokens = ((chosen >= 0) & (chosen < len(rows))).nonzero().flatten()
    x[tokens] = rows[chosen[tokens].long()]


def _check_index(chosen: Tensor, num_rows: int) -> None:
    for token in (chosen >= num_rows).nonzero().flatten().tolist():
        raise RuntimeError(f"index[{token}] is {int(chosen[token])}, rows has {num_rows} rows")


def apply_phi(phi: Tensor, phi_args: Tensor, z: Tensor, tau: float | Tensor = -torch.inf) -> Tensor:
    """(E, R) what each reading becomes; readings below tau are not among the largest."""
    a, b, c, d = phi_args.to(z.dtype).unbind(2)
    first, second, angle = z[:, :-1:2], z[:, 1::2], a[:, :-1:2]  # pairs begin at even directions
    length = (first.square() + second.square()).sqrt()
    turned_to = _pairs(z, length * angle.cos() - first, length * angle.sin() - second)
    is_turned = _pairs(z, *2 * [(first > b[:, :-1:2]).to(z.dtype)])
    turned_by = _pairs(
        z, first * angle.cos() - second * angle.sin() - first, first * angle.sin() + second * angle.cos() - second
    )
    results = {
        Phi.AFFINE: a * z + b,
        Phi.SET: a - z,
        Phi.CLAMP: z.maximum(a).minimum(b) - z,
        Phi.GATED: torch.where(z > a, b * z + c, d),
        Phi.TANH: a * z.tanh(),
        Phi.SILU: a * z * z.sigmoid(),
        Phi.SIGN: a * z.sign(),
        Phi.ANGLE: turned_to * is_turned,
        Phi.ROTATE: turned_by,
        Phi.TOP_K: torch.where((z > a) & (z >= tau), b * z + c, d),
    }
    delta = torch.zeros_like(z)
    for kind, result in results.items():
        delta = torch.where(phi == kind, result, delta)
    return delta


def _pairs(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(E, R) with the halves of each pair next to each other; an odd last direction has no partner and reads 0."""
    joined = torch.zeros_like(z)
    joined[:, : 2 * first.shape[1]] = torch.stack([first, second], 2).flatten(1)
    return joined


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
    num_rows, vocab = out.shape
    if IS_CHECKED:
        _check_stream_rows(rows[:num_rows], streams)
    names_row = (rows[:num_rows] >= 0) & (rows[:num_rows] < torch.tensor([len(s) for s in streams], device=out.device))
    mixed = names_row[:, 0].nonzero().flatten()  # (M,) the rows that are concerned
    total = torch.zeros(len(mixed), vocab, dtype=compute_type(out), device=out.device)
    banned = torch.zeros_like(total, dtype=torch.bool)
    is_masked = torch.zeros_like(mixed, dtype=torch.bool)
    for k, stream in enumerate(streams):
        weight, temperature = weights[mixed, k], _column(temperatures, mixed, k, 1.0)
        alpha, top_p = _column(alphas, mixed, k, 0.0), _column(top_ps, mixed, k, 1.0)
        has_mask = (alpha > 0) | (top_p < 1)
        is_used = names_row[mixed, k] & ((weight != 0) | has_mask | (k == 0))
        logits = stream[rows[mixed, k].long().clamp(0, len(stream) - 1), :vocab].to(total.dtype)
        banned |= is_used[:, None] & (logits == -torch.inf)
        if alphas is not None or top_ps is not None:
            banned |= (is_used & has_mask)[:, None] & ~_plausible(logits, alpha, top_p if top_ps is not None else None)
            is_masked |= is_used & has_mask
        total += torch.where(is_used[:, None], weight[:, None] * _term(logits, temperature, log_softmax, mixed, k), 0)
    total[banned] = -torch.inf
    if num_allowed is not None:
        num_allowed[mixed] = (~banned).sum(1, dtype=torch.int32)
    _rescue(total, streams[0][rows[mixed, 0].long(), :vocab], is_masked & banned.all(1))
    out[mixed] = total.to(out.dtype)


def _column(table: Tensor | None, mixed: Tensor, k: int, default: float) -> Tensor:
    """(M,) a parameter of stream k; absent tables hold the value that changes nothing."""
    return torch.full_like(mixed, default, dtype=torch.float32) if table is None else table[mixed, k]


def _term(logits: Tensor, temperature: Tensor, log_softmax: Tensor | None, mixed: Tensor, k: int) -> Tensor:
    """(M, V) one stream as it enters the mix; what it bans reads 0, so that -inf never meets -inf."""
    tempered = logits / temperature[:, None]
    if log_softmax is not None:
        tempered = torch.where(log_softmax[mixed, k, None], tempered.log_softmax(1), tempered)
    return torch.where(logits == -torch.inf, 0, tempered)


def _plausible(logits: Tensor, alpha: Tensor, top_p: Tensor | None) -> Tensor:
    """(M, V) whether a token is within log alpha of the row's best one, and among the top p of the mass."""
    close = logits >= logits.amax(1, keepdim=True) + alpha.to(logits.dtype).log()[:, None]
    if top_p is None:
        return close
    best_first, order = logits.softmax(1).sort(dim=1, descending=True)
    kept = (best_first.cumsum(1) - best_first <= top_p[:, None]) | (top_p[:, None] >= 1)
    cut = logits.gather(1, order).masked_fill(~kept, torch.inf).amin(1, keepdim=True)  # equal logits stay together
    return close & (logits >= cut)


def _rescue(total: Tensor, main: Tensor, is_empty: Tensor) -> None:
    """Where the masks exclude each other, the main stream's best token is left."""
    best = main.argmax(1)
    lost = (is_empty & (main.amax(1) > -torch.inf)).nonzero().flatten()
    total[lost, best[lost]] = main[lost, best[lost]].to(total.dtype)


def _check_stream_rows(rows: Tensor, streams: list[Tensor]) -> None:
    for k, stream in enumerate(streams):
        for row in (rows[:, k] >= len(stream)).nonzero().flatten().tolist():
            raise RuntimeError(f"rows[{row}, {k}] is {int(rows[row, k])}, streams[{k}] has {len(stream)} rows")


def apply_temperature_(logits: Tensor, temperature: Tensor) -> None:
    chosen = temperature[: len(logits)].to(compute_type(logits))[:, None]
    best = torch.arange(logits.shape[1], device=logits.device) == logits.argmax(1, keepdim=True)
    greedy = logits.masked_fill(~best, -torch.inf)
    tempered = torch.where(chosen > 0, logits / chosen, greedy).to(logits.dtype)
    logits.copy_(torch.where((chosen < 0) | (chosen == 1), logits, tempered))


def explain_rows(final: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
    log_p = final.to(compute_type(final)).log_softmax(1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0).sum(1)
    if base is None:
        return entropy.float(), torch.zeros_like(entropy).float()
    log_q = base[:, : final.shape[1]].to(log_p.dtype).log_softmax(1)
    return entropy.float(), torch.where(p > 0, p * (log_p - log_q), 0).sum(1).float()


def divergences(mature: Tensor, early: Tensor, owners: Tensor) -> Tensor:
    compute = compute_type(mature)
    is_owned = (owners >= 0) & (owners < len(mature))
    rows = owners[is_owned]
    log_q = mature.to(compute).log_softmax(1)[rows]
    log_p = early[is_owned, : mature.shape[1]].to(compute).log_softmax(1)
    m = (log_p.exp() + log_q.exp()) / 2
    terms = torch.special.xlogy(m, m) - m * (log_p + log_q) / 2
    found = mature.new_zeros(len(early), dtype=torch.float32)
    found[is_owned] = terms.masked_fill(log_q == -torch.inf, 0).sum(1).float()
    return found


def cut_rows_(logits: Tensor, low: Tensor | None, high: Tensor | None) -> None:
    for bound, is_out in ((low, torch.lt), (high, torch.gt)):
        if bound is not None:
            wide = logits.to(compute_type(logits))
            logits.masked_fill_(is_out(wide, bound[: len(logits), None]), -torch.inf)


def typical_rows_(logits: Tensor, mass: Tensor) -> None:
    share = mass[: len(logits), None].double()
    log_p = logits.to(compute_type(logits)).log_softmax(1)
    entropy = explain_rows(logits, None)[0].to(log_p.dtype)
    deviation = (log_p + entropy[:, None]).abs()  # nats; inf where banned
    least_first, order = deviation.sort(dim=1)
    so_far = (log_p.exp() * WHOLE_MASS).long().gather(1, order).cumsum(1)
    wanted = (share * WHOLE_MASS).long().clamp(min=1).minimum(so_far[:, -1:])
    limit = least_first.gather(1, (so_far < wanted).sum(1, keepdim=True))
    logits.masked_fill_((deviation > limit) & (share < 1), -torch.inf)


def attention_rows(
    query: Tensor,
    keys: Tensor,
    block_table: Tensor,
    context: Tensor,
    scale: float,
    max_context: int,
    head_max: bool = False,
) -> Tensor:
    num_rows, num_heads, _ = query.shape
    num_blocks, block_size, num_kv_heads, _ = keys.shape
    position = torch.arange(max_context, device=query.device)  # (C,)
    has_room = (position < block_table.shape[1] * block_size) & (position < context[:num_rows, None])  # (Q, C)
    column = (position // block_size).clamp(max=max(block_table.shape[1] - 1, 0))
    block = block_table[:num_rows, column].long()  # (Q, C)
    is_known = (block >= 0) & (block < num_blocks)
    if IS_CHECKED:
        _check_blocks(block, is_known | ~has_room, block_size, num_blocks)
    compute = compute_type(query)
    chosen = keys[block.clamp(0, num_blocks - 1), position % block_size].to(compute)  # (Q, C, heads of keys, D)
    chosen = chosen.repeat_interleave(num_heads // num_kv_heads, dim=2)
    score = scale * torch.einsum("qhd,qchd->qhc", query.to(compute), chosen)
    is_seen = (has_room & is_known)[:, None]
    probability = score.masked_fill(~is_seen, -torch.inf).softmax(2).masked_fill(~is_seen, 0)
    return (probability.amax(1) if head_max else probability).float()


def _check_blocks(block: Tensor, is_fine: Tensor, block_size: int, num_blocks: int) -> None:
    for row, position in (~is_fine).nonzero().tolist():
        number, name = int(block[row, position]), f"block_table[{row}, {position // block_size}]"
        raise RuntimeError(f"{name} is {number}, keys have {num_blocks} blocks")
