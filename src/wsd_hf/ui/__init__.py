"""A page on which a pair answers while one watches: `wsd-hf ui`."""
