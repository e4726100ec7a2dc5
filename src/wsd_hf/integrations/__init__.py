"""Adapters for other programs: pipelines, evaluation harnesses, answer files of judges."""
