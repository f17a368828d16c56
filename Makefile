# `make demo` and `make test` set up all they need; PYTHON is Python 3.10 to 3.13. PYTHONS are those of `make test-all`.
# TESTS are the files and folders to test; all if empty. COVERAGE=--cov measures what the tests run, which takes longer.
# WORKERS is the number of processes that run the fast tests and the integrations; some tests wait, so three keep two cores
# busy. Packages are installed into VENV, with uv where it is there.
# EXTRAS are the extras of the package that tests and checks are run with.
PYTHON ?= python3
PYTHONS ?= python3.10 python3.12 python3.13
VENV ?= .venv
COVERAGE ?=
WORKERS ?= 3
TESTS ?=
EXTRAS ?= test
BIN := $(VENV)/bin

# Packages are installed uncompiled: Python compiles what it imports, once, unless it is told to keep nothing.
export PYTHONDONTWRITEBYTECODE =

comma := ,
with = $(if $(findstring $(1),$(EXTRAS)),$(EXTRAS),$(1)$(comma)$(EXTRAS))

.PHONY: demo test test-integrations test-triton test-slow test-all check docs reference install

# The extra `test` has all that the demo needs.
demo:
	@test -e $(VENV)/installed-$(EXTRAS) || $(MAKE) --no-print-directory $(VENV)/installed-demo
	$(BIN)/radapter-demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal $(COVERAGE) $(TESTS)

# Tests with other people's programs and libraries: Chromium, nginx, Helm, Ray, Qdrant, TensorRT, clients of OpenAI's API.
# The first two are Debian's packages chromium and nginx-light.
test-integrations: $(VENV)/installed-$(call with,integrations)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "integration and not slow and not triton" --numprocesses $(WORKERS) --dist loadfile $(TESTS)

# Tests with a real tritonserver, the longest first. Two servers at a time keep two cores busy.
TRITON := tests/test_readme.py tests/test_examples.py tests/*/
test-triton: $(VENV)/installed-$(call with,integrations)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "triton and not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(TRITON)

# Whole programs, exhaustive cases, other people's models: about an hour in all, so `.ci/run` names those that it has time for.
test-slow: $(VENV)/installed-$(call with,integrations)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow $(TESTS)

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

# The pages of commands and of recipe fields, which a test compares with the source.
reference: install
	$(BIN)/python docs/reference.py

install: $(VENV)/installed-$(EXTRAS)

$(VENV)/installed-%: pyproject.toml
	@command -v $(PYTHON) > /dev/null || { \
	  echo "error: there is no $(PYTHON); Python 3.10 to 3.13 is needed; type the same again with another one, such as PYTHON=python3.12" >&2; exit 1; \
	}
	@$(PYTHON) .ci/install.py $(VENV) $*
