"""Models as streams of logits, caches, rows, and checks of arguments; imports no strategy."""
