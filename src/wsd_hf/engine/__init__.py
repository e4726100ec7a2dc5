"""Models as streams of logits, caches, rows, and checks of arguments; knows no strategy."""
