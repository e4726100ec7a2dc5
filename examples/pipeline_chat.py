"""transformers' text generation pipeline with a pilot: questions in a batch, a chat, and an answer that is streamed.

Runs as it is, on the shipped pair, which knows single questions about its made-up world. For models of your own, give their
paths or Hub ids: `pipeline("text-generation", model="...", assistant_model="...", strategy="wsd")`.
"""

from transformers import TextStreamer, pipeline

from wsd_hf import Pair  # importing wsd_hf gives the pipeline `strategy=`
from wsd_hf.tiny import demo_questions

pair = Pair.tiny()
ask = pipeline(
    "text-generation",
    model=pair.base,
    tokenizer=pair.tokenizer,
    assistant_model=pair.pilot,
    assistant_tokenizer=pair.pilot_tokenizer,
    strategy="wsd",
    do_sample=False,
    max_new_tokens=64,
)

chats = [question["messages"] for question in demo_questions()[:3]]
for chat, records in zip(chats, ask(chats, batch_size=3, return_full_text=False), strict=True):
    print(f"{chat[-1]['content']}\n    {records[0]['generated_text']}\n")

# The history goes on with what the pipeline returns; a last assistant message is the beginning of the answer.
history = [{"role": "user", "content": "What does the Keloft eat?"}, {"role": "assistant", "content": "Thank you"}]
history = ask(history)[0]["generated_text"]
print(history[-1]["content"], end="\n\n")

# Settings of generate() and of the strategy may change with every call.
ask(chats[0], wsd_threshold=0.95, streamer=TextStreamer(pair.tokenizer, skip_prompt=True, skip_special_tokens=True))
