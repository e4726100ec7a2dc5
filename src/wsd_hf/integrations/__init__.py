"""What other programs and places meet: the Hub, pipelines, evaluation harnesses, answer files."""
