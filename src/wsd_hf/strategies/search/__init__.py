"""Weak-to-strong search: a value of unfinished responses, and the search that it guides. Each is usable alone."""
