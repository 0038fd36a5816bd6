"""What happens to logits: the methods, the streams they read and how rows of different requests are mixed."""
