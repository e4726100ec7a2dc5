"""What is text: chat prompts for base and pilot, and the comparison of their vocabularies."""
