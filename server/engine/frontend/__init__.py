"""In the API server's process."""
