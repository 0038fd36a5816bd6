"""HTTP in, tokens out: the FastAPI service around a stock vLLM engine."""
