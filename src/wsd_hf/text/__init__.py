"""Text: chat prompts for base and pilot, ends of answers, streaming, and the bridge between two vocabularies."""
