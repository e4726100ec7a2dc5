"""Training of a pilot on the beginnings of good answers: the part that a pilot writes before the base takes over."""
