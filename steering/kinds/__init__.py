"""The kinds of serving: what makes methods happen. Each is one file: what it needs, checks and tells."""
