"""Reward-guided decoding: the pilot writes step by step, and the base rewrites the steps that a reward finds too low."""
