"""What requests may name: vectors, presets, and what this server can do."""
