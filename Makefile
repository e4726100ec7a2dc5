PYTHON ?= python3
PYTEST_OPTIONS ?= -n 2

.PHONY: demo test test-lowest sweep bench gpu lint types english docs dist check clean

demo: .venv-demo/ready
	.venv-demo/bin/wsd-hf demo

test: .venv/ready
	.venv/bin/pytest $(PYTEST_OPTIONS)

test-lowest: .venv-lowest/ready
	.venv-lowest/bin/pytest $(PYTEST_OPTIONS)

sweep: .venv/ready
	.venv/bin/pytest $(PYTEST_OPTIONS) -m sweep

bench: .venv/ready
	.venv/bin/python benchmarks/decode.py

# On a machine with CUDA devices, in the environment of PYTHON, whose torch and transformers are used as they are.
gpu:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	$(PYTHON) -m pytest -q -n 8 tests/test_cuda.py
	$(PYTHON) benchmarks/decode.py --preset gpu --out benchmarks/results/gpu.json

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/ready
	.venv/bin/mypy

english: .venv/ready
	.venv/bin/python tests/english.py

docs: .venv/ready
	.venv/bin/mkdocs build --strict --quiet

# The wheel is built from the sdist, installed into an environment of its own, and run from outside the repository.
# setuptools packs files that the last build packed, so its list of them goes first.
dist: .venv/ready
	rm -rf dist .venv-dist src/*.egg-info
	.venv/bin/python -m build --quiet
	.venv/bin/python tests/dist.py
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd / && "$(CURDIR)/.venv-dist/bin/python" -m wsd_hf --version
	cd / && "$(CURDIR)/.venv-dist/bin/wsd-hf" demo

check: lint types english docs dist test test-lowest sweep

.venv/ready .venv-lowest/ready: PACKAGE = .[dev]
.venv-demo/ready: PACKAGE = .

.venv/ready .venv-demo/ready: constraints.txt
.venv-lowest/ready: constraints-lowest.txt

.venv/ready .venv-lowest/ready .venv-demo/ready: pyproject.toml setup.cfg constraints-tools.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --constraint $(filter-out constraints-tools.txt,$(filter constraints%,$^)) --editable '$(PACKAGE)'
	touch $@

clean:
	rm -rf .venv .venv-* build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
