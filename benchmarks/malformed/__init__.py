"""Malformed inputs over every command and the Python API: what is refused in one sentence, and what falls through."""
