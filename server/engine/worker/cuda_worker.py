"""The worker on CUDA devices."""

from vllm.v1.worker.gpu_worker import Worker

from whipstaff.server.engine.worker.worker import SteeredWorker


class CudaWorker(SteeredWorker, Worker):
    """vLLM's, steered."""
