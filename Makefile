# `make demo` and `make test` set up all they need; PYTHON is Python 3.10 to 3.13. PYTHONS are those of `make test-all`.
# TESTS are the files and folders to test; all if empty. COVERAGE=--cov measures what the tests run, which takes longer.
# WORKERS is the number of processes that test; some tests wait, so three keep two cores busy. INSTALL is what installs packages into VENV: uv where it is there.
# EXTRAS are the extras of the package that tests and checks are run with.
PYTHON ?= python3
PYTHONS ?= python3.10 python3.12 python3.13
VENV ?= .venv
COVERAGE ?=
WORKERS ?= 3
TESTS ?=
EXTRAS ?= test
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check
INSTALL ?= $(if $(shell command -v uv),uv pip install --quiet --python $(BIN)/python,$(PIP))

# Packages are installed uncompiled: Python compiles what it imports, once, unless it is told to keep nothing.
export PYTHONDONTWRITEBYTECODE =

define MAKE_VENV
@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
  { echo "Python 3.10 to 3.13 is needed, $$($(PYTHON) --version) found; name another: make PYTHON=python3.12"; exit 1; }
@$(PYTHON) -m venv $(VENV)
endef

comma := ,
with = $(if $(findstring $(1),$(EXTRAS)),$(EXTRAS),$(1)$(comma)$(EXTRAS))

.PHONY: demo test test-integrations test-all check docs install

# The extra `test` has the demo, too.
demo:
	@test -e $(VENV)/installed-$(EXTRAS) || { \
	  echo "Installing what the demo needs: one to two minutes with a fast network, most of it for torch. The demo itself takes about two minutes."; \
	  $(MAKE) --no-print-directory $(VENV)/installed-demo; \
	}
	$(BIN)/radapter-demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal $(COVERAGE) $(TESTS)

# Tests with other people's programs and libraries: Chromium, nginx, Helm, Ray, Qdrant, TensorRT, clients of OpenAI's API.
# The first two are Debian's packages chromium and nginx-light.
test-integrations: $(VENV)/installed-$(call with,integrations)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "integration and not slow and not triton" --numprocesses $(WORKERS) --dist loadfile $(TESTS)

# Each Python has an environment of its own: .venv-3.10, .venv-3.12, .venv-3.13.
test-all:
	set -e; for python in $(PYTHONS); do \
	  version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  $(MAKE) test PYTHON=$$python VENV=.venv-$$version; \
	done

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site lies in site/; a warning, such as a link to nowhere, is an error.
docs: $(VENV)/installed-$(call with,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(VENV)/installed-$(EXTRAS)

$(VENV)/installed-%: pyproject.toml
	$(MAKE_VENV)
	$(INSTALL) --editable '.[$*]'
	@touch $@
