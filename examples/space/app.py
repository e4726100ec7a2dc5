"""`wsd-hf ui` as a Hugging Face Space; the variables BASE and PILOT name models other than the shipped ones."""

import os

from wsd_hf.cli import app

models = {f"--{name.lower()}": os.environ.get(name) for name in ("BASE", "PILOT")}
app(["ui", "--host", "0.0.0.0", *(word for option, name in models.items() if name for word in (option, name))])
