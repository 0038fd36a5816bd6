"""What happens to hidden states: edits, where they apply, the files they come from and the tables they live in."""
