"""Evaluation harnesses that ask a base and its pilot, and the answer files of those that do not."""
