"""What changes hidden states, attention and routing."""
