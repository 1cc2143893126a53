# make demo | test | both | slow | lint | types | clean. Needs only make and a Python >= 3.11.
#
# Two ends of what is supported: the oldest (Python 3.11, JAX 0.10) and the newest JAX
# (Python >= 3.12). `test` runs on the newest that is found, `both` and `slow` on each end that is;
# one of the two is enough to pass, and the last lines say which ran.

OLDEST_PYTHON ?= $(shell tools/find_python.sh 3.11)
NEWEST_PYTHON ?= $(shell tools/find_python.sh 3.14 3.13 3.12 3.15)
# Looked up once here: a recursive variable would search again at every use.
OLDEST_PYTHON := $(OLDEST_PYTHON)
NEWEST_PYTHON := $(NEWEST_PYTHON)
PYTHON ?= $(or $(NEWEST_PYTHON),$(OLDEST_PYTHON))

ENDS := $(if $(OLDEST_PYTHON),oldest) $(if $(NEWEST_PYTHON),newest)
# With neither end found, the newest is attempted, to fail with a sentence that says what to do.
ENDS := $(or $(strip $(ENDS)),newest)
# Lint and types run in the first of the test environments.
DEV := .venv-$(firstword $(ENDS))
JOBS ?= 2
# A file stays with one worker, since its tests share what they compile; in the order of collection
# the examples of the docstrings come last and fill both workers up to the end.
PYTEST := -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test both slow lint types environments clean
.PHONY: tested-one tested-both $(ENDS:%=test-%) $(ENDS:%=slow-%)

demo: .venv/installed
	.venv/bin/python -m jaxdp train

# Tests run in this order; -j would interleave what they print. The others may run at once, so that
# one installs while another waits for the network: `make -j2 environments lint types`.
ifneq ($(filter test% both slow%,$(MAKECMDGOALS)),)
.NOTPARALLEL:
endif
test: test-$(lastword $(ENDS)) tested-one

both: $(ENDS:%=test-%) tested-both

slow: $(ENDS:%=slow-%) tested-both

$(ENDS:%=test-%): test-%: .venv-%/installed
	.venv-$*/bin/python $(PYTEST)

# An empty expression selects the slow tests too.
$(ENDS:%=slow-%): slow-%: .venv-%/installed
	.venv-$*/bin/python $(PYTEST) -m ""

tested-one:
	@echo "Tested: $$(.venv-$(lastword $(ENDS))/bin/python tools/versions.py); make both runs the oldest and the newest."

tested-both:
	@for end in $(ENDS); do echo "Tested: $$(.venv-$$end/bin/python tools/versions.py)."; done
	@$(if $(OLDEST_PYTHON),,echo "Not tested: JAX 0.10 on Python 3.11 (no Python 3.11 found).")
	@$(if $(NEWEST_PYTHON),,echo "Not tested: the newest JAX (no Python >= 3.12 found).")

lint: $(DEV)/installed-dev
	$(DEV)/bin/ruff check .

types: $(DEV)/installed-dev
	$(DEV)/bin/pyright --pythonpath $(DEV)/bin/python

environments: $(ENDS:%=.venv-%/installed) $(DEV)/installed-dev

.venv/installed: pyproject.toml
	tools/environment.sh "$(PYTHON)" .venv --editable '.[demo]'

.venv-oldest/installed: pyproject.toml
	tools/environment.sh "$(OLDEST_PYTHON)" .venv-oldest --editable '.[test]' 'jax<0.11'

.venv-newest/installed: pyproject.toml
	tools/environment.sh "$(NEWEST_PYTHON)" .venv-newest --editable '.[test]'

$(DEV)/installed-dev: $(DEV)/installed
	$(DEV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest out build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
