"""Which blocks of KV cache every sequence has in each step of a worker, and which are copied. Mixed into vLLM's
worker: its `worker_extension_cls`."""

from typing import Any


class WatchesBlocks:
    """Calls over `collective_rpc`."""

    def start_watching(self) -> None:
        """While nothing runs."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        self._watched: list[dict[str, Any]] = []
        self._blocks: dict[str, list[int]] = {}
        execute = runner.execute_model

        def watched(output: Any, *args: Any, **kwargs: Any) -> Any:
            if output.total_num_scheduled_tokens:
                self._watched.append(self._seen(output))
            return execute(output, *args, **kwargs)

        runner.execute_model = watched

    def stop_watching(self) -> list[dict[str, Any]]:
        """Of every step: "tokens", how many each sequence computes; "blocks" that it has, by its id; and "copies",
        (source, target) blocks."""
        del self.model_runner.execute_model  # type: ignore[attr-defined]
        return self._watched

    def _seen(self, output: Any) -> dict[str, Any]:
        cached = output.scheduled_cached_reqs
        for new in output.scheduled_new_reqs:
            self._blocks[new.req_id] = list(new.block_ids[0])
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            kept = [] if name in cached.resumed_req_ids else self._blocks[name]
            self._blocks[name] = [*kept, *(blocks[0] if blocks else ())]
        tokens = dict(output.num_scheduled_tokens)
        copies = [list(pair) for pair in output.kv_cache_block_copies or ()]
        return {"tokens": tokens, "blocks": {name: self._blocks[name] for name in tokens}, "copies": copies}
