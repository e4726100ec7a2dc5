"""The engine: models as streams of logits, caches, rows, and checks; it knows no strategy."""
