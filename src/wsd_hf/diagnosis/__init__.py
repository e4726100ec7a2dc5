"""Whether Weak-to-Strong Decoding suits a pair of models: measures from one draft and one forward of the base per prompt."""
