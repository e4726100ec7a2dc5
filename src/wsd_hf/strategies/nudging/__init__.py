"""Nudging: the pilot says the next word wherever the base is unsure."""
