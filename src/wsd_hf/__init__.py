"""Weak-to-Strong Decoding for Hugging Face transformers."""
