"""Draft and check: small models and n-grams propose tokens, and one forward of the base checks them; for every strategy."""
