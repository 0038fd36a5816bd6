"""Activations of a transformers model on this machine, plain or under edits.

Its parts are found by structure, as the engine's are (see `sites`): a list of blocks, each with an attention that has
an output projection and, beside it, an MLP or a mixture of experts.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whipstaff.steering.apply import applied
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.source import Asked, Entry, Gives, Scored
from whipstaff.steering.method import HookPoint
from whipstaff.steering.methods import METHODS
from whipstaff.steering.ops import EditOp
from whipstaff.steering.shape import ModelShape, config_shape
from whipstaff.steering.sites import SitesNotFound
from whipstaff.steering.where import Where

_PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj", "wo")  # of an attention, by the families' own names
_WINDOW = 16  # batches that are sorted by length together
Change = Callable[[Tensor], Tensor | None]  # what happens to (batch, tokens, width); None: it was only looked at


class LocalModel:
    """A `Source`: a causal language model of transformers.

    Args:
        model: in evaluation mode.
        tokenizer: its own; None where token ids alone are asked about.
        batch_size: texts that are computed together.
        name: what it was loaded from, for provenance.
    """

    gives: frozenset[Gives] = frozenset({"rows", "answers", "weights"})

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8, name: str = "") -> None:
        self.model, self.tokenizer, self.batch_size, self.name = model, tokenizer, batch_size, name
        self.shape: ModelShape = config_shape(model.config)
        self.experts_per_token = int(getattr(model.config.get_text_config(), "num_experts_per_tok", 0) or 0)
        self.max_len: int | None = None  # some models go on beyond what their config says
        self.blocks = _blocks(model)
        self._num_inserted = 0  # rows before every text, in the place of tokens' embeddings

    @staticmethod
    def load(
        name: str, dtype: str = "float32", device: str | None = None, batch_size: int = 8, **said: Any
    ) -> "LocalModel":
        """A folder's or the hub's model. Raises: SteeringError where it cannot be loaded."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **said)
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise SteeringError(f"{name}: no model that transformers loads: {error}", "model") from error
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return LocalModel(model.to(place).eval().requires_grad_(False), tokenizer, batch_size, name)

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    def identity(self) -> dict[str, Any]:
        """The model's name and a digest of its config and of some of every weight."""
        digest = hashlib.sha256(json.dumps(self.model.config.to_dict(), sort_keys=True, default=str).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(
                name.encode() + weight.flatten()[:: max(weight.numel() // 256, 1)].float().cpu().numpy().tobytes()
            )
        name = Path(self.name).name if Path(self.name).exists() else self.name
        return {
            "model": name,
            "model_digest": digest.hexdigest(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    # ---- reading

    def read(self, asked: Sequence[Asked], points: Sequence[HookPoint]) -> Iterator[dict[HookPoint, Tensor]]:
        for point in points:
            self._module(point)  # says at once what there is not
        yield from self._in_order(asked, lambda each: each.ids, lambda batch: self._read_batch(batch, points))

    def _read_batch(self, batch: list[Asked], points: Sequence[HookPoint]) -> list[dict[HookPoint, Tensor]]:
        seen: dict[HookPoint, Tensor] = {}

        def look_at(point: HookPoint) -> Change:
            return lambda x: seen.__setitem__(point, x)

        with torch.inference_mode(), self.changed({point: look_at(point) for point in points}):
            self.forward([each.ids for each in batch], num_logits=1)
        return [{point: _picked(seen[point][row], each) for point in points} for row, each in enumerate(batch)]

    def predict(self, texts: Sequence[tuple[int, ...]], entries: Sequence[Entry] = ()) -> Iterator[Tensor]:
        def compute(batch: list[tuple[int, ...]]) -> list[Tensor]:
            lengths = [len(ids) for ids in batch]
            with torch.inference_mode(), self.edited(entries, lengths):
                logits = self.forward(batch)
            return [logits[row, length - 1].float().log_softmax(-1).cpu() for row, length in enumerate(lengths)]

        yield from self._in_order(texts, lambda ids: ids, compute)

    def score(self, texts: Sequence[tuple[int, ...]]) -> Iterator[Scored]:
        """Each text's, in order."""

        def compute(batch: list[tuple[int, ...]]) -> list[Scored]:
            kept: list[Tensor] = []
            with torch.inference_mode():
                hook = self._output_embeddings().register_forward_pre_hook(lambda _, args: kept.append(args[0]))
                try:
                    logits = self.forward(batch)
                finally:
                    hook.remove()
            return [_scored(kept[0][row], logits[row], ids) for row, ids in enumerate(batch)]

        yield from self._in_order(texts, lambda ids: ids, compute)

    def _output_embeddings(self) -> nn.Module:
        found: nn.Module | None = self.model.get_output_embeddings()
        if found is None:
            raise SteeringError(f"{type(self.model).__name__} shows no output embeddings", "model")
        return found

    @property
    def embedding_size(self) -> int:
        """How many tokens have an output embedding."""
        weight: Tensor = self._output_embeddings().weight  # type: ignore[assignment]
        return len(weight)

    def embeddings_of(self, ids: Sequence[int]) -> Tensor:
        """(n, hidden) float32 of some tokens, before any scaling."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.detach()[list(ids)].float().cpu()

    def _in_order(
        self, items: Sequence[Any], ids_of: Callable[[Any], Any], compute: Callable[[list[Any]], list[Any]]
    ) -> Iterator[Any]:
        """Results in the order of the items, computed in batches of similar lengths."""
        window = self.batch_size * _WINDOW
        for start in range(0, len(items), window):
            some = items[start : start + window]
            order = sorted(range(len(some)), key=lambda index: len(ids_of(some[index])))
            found: dict[int, Any] = {}
            for at in range(0, len(order), self.batch_size):
                chosen = order[at : at + self.batch_size]
                found |= dict(zip(chosen, compute([some[index] for index in chosen]), strict=True))
            yield from (found[index] for index in range(len(some)))

    def forward(self, texts: Sequence[Sequence[int]], num_logits: int = 0) -> Tensor:
        """(batch, tokens, vocab) logits; texts are padded at their ends, which no token of theirs sees.

        Args:
            num_logits: only so many of the last positions, where nobody asks for logits; 0: all.
        """
        num = self._num_inserted
        texts = [(*[0] * num, *text) for text in texts]
        longest = max(map(len, texts))
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most and longest > most:
            raise SteeringError(f"a text has {longest} tokens, and the model takes {most}")
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        logits: Tensor = self.model(**inputs, use_cache=False, logits_to_keep=num_logits).logits
        return logits if num_logits else logits[:, num:]

    # ---- edits

    @contextmanager
    def edited(
        self, entries: Sequence[Entry], lengths: Sequence[int], prompt_lens: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Within: texts of these lengths are computed as requests with these entries would be.

        Args:
            prompt_lens: how many of a text's tokens are its prompt; None: all.
        """
        inserted = [entry.rows for entry in entries if entry.rows is not None]
        if inserted:
            assert len(inserted) == len(entries), "edits would count their tokens without the rows"
            with self._inserting(torch.cat(inserted)):
                yield
            return
        if not entries:
            yield
            return
        longest, prompts = max(lengths), prompt_lens or lengths
        made: dict[HookPoint, list[tuple[Sequence[EditOp], Tensor]]] = {}
        for entry in entries:
            for point, ops, where in ops_of(entry, self.shape):
                mask = torch.zeros(len(lengths), longest, 1, dtype=torch.bool, device=self.device)
                for row, (length, prompt_len) in enumerate(zip(lengths, prompts, strict=True)):
                    for start, end in where.intervals(prompt_len):
                        mask[row, start : length if end is None else min(end, length)] = True
                made.setdefault(point, []).append((ops, mask))
        with self.changed({point: _editing(some) for point, some in made.items()}):
            yield

    @contextmanager
    def _inserting(self, rows: Tensor) -> Iterator[None]:
        """Within: every text begins with (n, hidden) rows."""
        embeddings = self.model.get_input_embeddings()
        scale = getattr(embeddings, "embed_scale", 1.0)

        def put(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            own = (rows.to(output.device) * scale).to(output.dtype).expand(len(output), -1, -1)
            return torch.cat([own, output[:, len(rows) :]], 1)

        hook, self._num_inserted = embeddings.register_forward_hook(put), len(rows)
        try:
            yield
        finally:
            hook.remove()
            self._num_inserted = 0

    @contextmanager
    def changed(self, changes: Mapping[HookPoint, Change]) -> Iterator[None]:
        """Within: activations at some places go through functions."""
        with ExitStack() as hooks:
            for point, change in changes.items():
                hooks.callback(self._hook(point, change).remove)
            yield

    def _hook(self, point: HookPoint, change: Change) -> Any:
        module, is_input = self._module(point)
        if is_input:
            return module.register_forward_pre_hook(_input_hook(change), with_kwargs=True)
        return module.register_forward_hook(_output_hook(change))

    def _module(self, point: HookPoint) -> tuple[nn.Module, bool]:
        """The module whose input or output a place is. Raises: SteeringError."""
        if not 0 <= point.layer < len(self.blocks):
            raise SteeringError(f"layer {point.layer}: the model has layers 0 to {len(self.blocks) - 1}", "layers")
        block = self.blocks[point.layer]
        if point.site in ("resid_pre", "resid_post"):
            return block, point.site == "resid_pre"
        if point.site == "attn_head":
            return self.output_projection(point.layer), True
        if point.site in ("attn_in", "attn_out"):
            return _attention(block, point.layer), point.site == "attn_in"
        mlp = _mlp(block, point.layer)
        if point.site != "router":
            return mlp, point.site == "mlp_in"
        gate = getattr(mlp, "gate", None) or getattr(mlp, "router", None)
        if not isinstance(gate, nn.Module) or not self.shape.num_experts:
            raise SteeringError("the model has no experts", "site")
        return gate, False

    def output_projection(self, layer: int) -> nn.Module:
        """The layer that takes the concatenated heads."""
        attention = _attention(self.blocks[layer], layer)
        for name in _PROJECTIONS:
            if isinstance(found := getattr(attention, name, None), nn.Module):
                return found
        raise SitesNotFound(f"layer {layer}: {type(attention).__name__} has none of {', '.join(_PROJECTIONS)}")

    def projected(self, layer: int, heads: Tensor) -> Tensor:
        """(..., heads, head_dim) through the output projection, without its bias: what heads write to the stream."""
        projection: Any = self.output_projection(layer)
        weight = projection.weight.detach().float().cpu()  # Linear: (out, in); GPT-2's Conv1D: (in, out)
        flat = heads.flatten(-2)
        found: Tensor = flat @ (weight.T if isinstance(projection, nn.Linear) else weight)
        return found


def ops_of(entry: Entry, model: ModelShape) -> Iterator[tuple[HookPoint, Sequence[EditOp], Where]]:
    """The edits of an entry and their tokens, as the planner would have them; its numbers may ask for gradients."""
    method = METHODS[entry.method]
    params = method.params.model_validate(dict(entry.params))
    where = Where.of(entry.where or method.where)
    for each, its_where in method.spread(params, entry.tensors, where):
        for point, tensors in entry.tensors.items():
            if ops := method.ops(tensors, each, point, model):
                yield point.canonical, ops, its_where


def _editing(made: Sequence[tuple[Sequence[EditOp], Tensor]]) -> Change:
    def change(x: Tensor) -> Tensor:
        for ops, mask in made:
            x = torch.where(mask, applied(x, ops), x)
        return x

    return change


def _picked(rows: Tensor, asked: Asked) -> Tensor:
    """(positions, width) or (1, width) of one text's (tokens, width)."""
    chosen = rows[list(asked.positions)].float().cpu()
    return chosen.double().mean(0, keepdim=True).float() if asked.is_mean else chosen.clone()


def _scored(states: Tensor, logits: Tensor, ids: Sequence[int]) -> Scored:
    num, following = len(ids), torch.tensor(ids[1:], device=logits.device)[:, None]
    log_p = logits[: num - 1].float().log_softmax(-1)
    own = log_p.gather(1, following)[:, 0]
    return Scored(states[:num].float().cpu(), own.cpu(), (own >= log_p.amax(1)).cpu())


def _input_hook(change: Change) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        new = change(x)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return hook


def _output_hook(change: Change) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        new = change(output if isinstance(output, Tensor) else output[0])
        if new is None:
            return None
        return new if isinstance(output, Tensor) else (new, *output[1:])

    return hook


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The longest list of blocks that hold an attention."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [each for each in lists if len(each) and _find_attention(each[0]) is not None]
    if not found:
        raise SitesNotFound(f"{type(model).__name__} has no list of blocks with attention")
    return max(found, key=len)


def _find_attention(block: nn.Module) -> nn.Module | None:
    return next((child for child in block.children() if "attention" in type(child).__name__.lower()), None)


def _attention(block: nn.Module, layer: int) -> nn.Module:
    found = _find_attention(block)
    if found is None:
        raise SitesNotFound(f"layer {layer}: {type(block).__name__} has no attention")
    return found


def _mlp(block: nn.Module, layer: int) -> nn.Module:
    """What holds matrices beside the attention."""
    found = [
        child
        for child in block.children()
        if child is not _find_attention(block) and any(weight.dim() > 1 for weight in child.parameters())
    ]
    if len(found) != 1:
        raise SitesNotFound(f"layer {layer}: {type(block).__name__} has {len(found)} modules that could be its MLP")
    return found[0]
