"""One corpus format a file, and their registry."""
