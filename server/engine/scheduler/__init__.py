"""In the scheduler's process."""
