"""Plain implementations, straight from the papers. Nothing here imports the project."""
