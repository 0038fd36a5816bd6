"""What operators a worker executes, by torch's profiler. Mixed into vLLM's worker: its `worker_extension_cls`."""

from torch.profiler import ProfilerActivity, profile

OURS = "whipstaff::"


class CountsOperators:
    """Calls over `collective_rpc`."""

    def start_counting(self) -> None:
        self._counting = profile(activities=[ProfilerActivity.CPU])
        self._counting.start()

    def stop_counting(self) -> dict[str, int]:
        """How often each ran, by name."""
        self._counting.stop()
        return {event.key: event.count for event in self._counting.key_averages()}
