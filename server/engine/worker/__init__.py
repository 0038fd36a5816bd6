"""In each worker's process."""
