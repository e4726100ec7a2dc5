"""What is text: chat prompts for base and pilot, streaming of an answer, and the bridge between two vocabularies."""
