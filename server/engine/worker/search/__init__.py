"""Requests that search: methods decide over several sequences, in the place of the draw."""
