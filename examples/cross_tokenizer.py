"""A pilot that does not share the base's vocabulary: both tokenizers are given, nothing else changes.

Runs as it stands on the shipped base and the second of its pilots.
"""

import wsd_hf
from wsd_hf.tiny import demo_questions

base, pilot, tokenizer, pilot_tokenizer = wsd_hf.load_tiny_pair(pilot="pilot_other_vocab")
text = "Quibime collects keys. Have a lovely day."
print(f"base:  {tokenizer.tokenize(text)}\npilot: {pilot_tokenizer.tokenize(text)}\n")

for question in demo_questions()[:3]:
    output = base.generate(
        **wsd_hf.build_inputs(question["messages"], tokenizer, pilot_tokenizer),
        assistant_model=pilot,
        strategy="wsd",
        tokenizer=tokenizer,
        assistant_tokenizer=pilot_tokenizer,
        max_new_tokens=64,
        return_dict_in_generate=True,
    )
    print(question["messages"][-1]["content"])
    wsd_hf.explain(output, tokenizer, stop_strings=wsd_hf.BASE_STOP_STRINGS).print()
    print()
