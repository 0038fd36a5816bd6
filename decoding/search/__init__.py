"""Decoding methods that search: several sequences of one request, which fork, die and shrink."""
