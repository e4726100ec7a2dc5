"""A pilot with a vocabulary of its own: the call is the same, and the draft crosses as text.

Runs as it is, on the shipped base and the second of its pilots.
"""

from wsd_hf import Pair
from wsd_hf.tiny import demo_questions

pair = Pair.tiny(pilot="pilot_other_vocab")
text = "Quibime collects keys. Have a lovely day."
print(f"base:  {pair.tokenizer.tokenize(text)}\npilot: {pair.pilot_tokenizer.tokenize(text)}\n")

for question in demo_questions()[:3]:
    output = pair.generate(question["messages"], max_new_tokens=64)
    print(question["messages"][-1]["content"])
    pair.explain(output).print()
    print()
