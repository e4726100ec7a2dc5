PYTHON ?= python3
PYTEST_OPTIONS ?= -n 2

.PHONY: demo test sweep bench lint types test-lowest check clean

demo: .venv/ready
	.venv/bin/wsd-hf demo

test: .venv/ready
	.venv/bin/pytest $(PYTEST_OPTIONS)

sweep: .venv/ready
	.venv/bin/pytest $(PYTEST_OPTIONS) -m sweep

bench: .venv/ready
	.venv/bin/python benchmarks/decode.py

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/ready
	.venv/bin/mypy

test-lowest: .venv-lowest/ready
	.venv-lowest/bin/pytest $(PYTEST_OPTIONS)

check: lint types test test-lowest sweep

.venv/ready: constraints.txt
.venv-lowest/ready: constraints-lowest.txt

.venv/ready .venv-lowest/ready: pyproject.toml setup.cfg constraints-tools.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --constraint $(filter-out constraints-tools.txt,$(filter constraints%,$^)) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-lowest build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
