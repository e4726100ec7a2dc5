"""Weak-to-Strong Decoding: settings, the switch, the draft, and the two engines that decode with it."""
