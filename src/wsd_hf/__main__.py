"""`python -m wsd_hf`: the command line."""

from .cli import app

app(prog_name="wsd-hf")
