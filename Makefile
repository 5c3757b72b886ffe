# Each target sets up .venv first when there is none, or when the dependencies have changed.
PYTHON ?= python3
BIN := .venv/bin
CORE := tokens attention passes shape checks methods atomic reference
ROOMS := model backbones reduce decode adapt measure compensate tune
CORE_FILES := $(CORE:%=src/tokendial/%.py) $(ROOMS:%=src/tokendial/%/*)
comma := ,
empty :=
space := $(empty) $(empty)

# Tests start many processes; each would compile torch, three times as long as importing it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint docs setup browser

demo: .venv/ready
	$(BIN)/tokendial demo

# Files in the order of their names: xdist's own would leave the long ones of few tests to the end.
test: .venv/ready
	$(BIN)/pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --cov --cov-report=
	$(BIN)/coverage report --fail-under=95 --include='$(subst $(space),$(comma),$(strip $(CORE_FILES)))'

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Without the advice of the theme to try its successor.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup: .venv/ready

# Tests of the server's page run in it; without it they are skipped.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
		echo "no browser could be installed (Debian's package: chromium); the page is not tested"

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; choose one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@
