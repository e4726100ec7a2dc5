"""Weak-to-Strong Decoding over two servers: a base and a pilot behind OpenAI-style completions."""
