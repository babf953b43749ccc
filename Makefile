# make demo | test | test-newest | lint | setup | lock | clean.   Everything sets itself up.
SHELL := /bin/bash
PY := .venv/bin/python
INPUTS := requirements.lock setup.cfg pyproject.toml .ci/setup

.PHONY: setup demo test test-newest lint lock clean
setup: .venv/.stamp

.venv/.stamp: $(INPUTS)
	@.ci/setup .venv

.venv-newest/.stamp: $(INPUTS)
	@.ci/setup .venv-newest newest

demo: .venv/.stamp
	@$(PY) -m sweeps.demo

test: .venv/.stamp lint
	@$(PY) -m pytest -n 2 --dist worksteal

test-newest: .venv-newest/.stamp
	@.venv-newest/bin/python -m pytest -n 2 --dist worksteal -m quick

lint: .venv/.stamp
	@$(PY) -m ruff check .

# The lock pins JAX to the version that GPU machines in use have.
lock: .venv/.stamp
	@printf 'jax==0.11.2\njaxlib==0.11.2\n' > .cache/constraints.txt
	uv pip compile setup.cfg --extra wandb --extra slurm --extra hf --extra dev --universal --python-version 3.12 \
	  --generate-hashes --no-header --no-annotate -c .cache/constraints.txt -o requirements.lock

clean:
	rm -rf .venv .venv-newest .cache build *.egg-info
