# `make demo`, `make test`, `make check`: the first run of any of them makes .venv; nothing else is to be
# installed by hand. `make demo` installs what running needs; the others add the tools of development.
# PYTHON picks the interpreter, VARIANT (cpu or cuda) the build, ARGS is passed on.
PYTHON  ?= python3
VARIANT ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
VENV    ?= .venv
PY      := $(VENV)/bin/python
JOBS    ?= 2
RUNTIME := $(VENV)/.$(VARIANT)
DEV     := $(VENV)/.$(VARIANT)-dev

.PHONY: demo test test-launch bench check coverage docs format wheel clean

demo: $(RUNTIME)
	$(PY) -m deepfm_dist.demo $(ARGS)

# Tests marked slow are left to `make check`. JOBS processes run them, one thread a rank: several ranks
# share the cores here.
# DEEPFM_DATA, where set, names a folder of real data sets; it reaches the tests through the environment,
# and those that need it skip without it.
test: $(DEV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# What `make test` leaves out of tests/launch, too: real schedulers, networks, installations.
test-launch: $(DEV)
	$(PY) -m pip install -r requirements/launch.txt
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "" tests/launch $(ARGS)

# Twenty minutes on two quiet cores; rewrites docs/benchmarks.md.
bench: $(DEV)
	$(PY) benchmarks $(ARGS)

check: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@DEEPFM_KILLS=4 $(MAKE) --no-print-directory test ARGS='-m "not launch" $(ARGS)'

# All tests of `make check` with the lines that none of them runs; two fifths slower.
coverage: $(DEV)
	@$(MAKE) --no-print-directory test ARGS='-m "not launch" --cov=deepfm_dist $(ARGS)'

# A site that needs no network, in site/; any broken link or reference is an error.
docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

format: $(DEV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

wheel: $(RUNTIME)
	$(PY) -m pip wheel --no-deps --wheel-dir dist .

# A stamp that is merely old means "install what changed"; no stamp means another variant or an install
# that broke off, and the two fbgemm builds share a folder, so that only an empty venv is safe.
$(RUNTIME): pyproject.toml requirements/base.txt requirements/$(VARIANT).txt requirements/torchrec.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("$(PYTHON) is Python %d.%d; 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12" % sys.version_info[:2])'
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install -r requirements/$(VARIANT).txt
	$(PY) -m pip install --no-deps -r requirements/torchrec.txt -e .
	touch $@

# The build's pins are named again, so that no tool moves them.
$(DEV): $(RUNTIME) requirements/dev.txt
	$(PY) -m pip install -r requirements/$(VARIANT).txt -r requirements/dev.txt
	touch $@

clean:
	rm -rf $(VENV) build dist site .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
