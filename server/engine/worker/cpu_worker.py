"""The worker on CPUs."""

from vllm.v1.worker.cpu_worker import CPUWorker

from whipstaff.server.engine.worker.worker import SteeredWorker


class CpuWorker(SteeredWorker, CPUWorker):
    """vLLM's, steered."""
