# tokenkit: two commands for everybody (`make tutorial`, `make test`), and a few for contributors.
# Everything shares one environment, .venv. Each step is skipped when it is done, and may be interrupted at any time.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# The marker is written last: an interrupted install is continued, a finished one is not repeated.
$(READY): requirements.lock setup.py settings.ini
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "tokenkit needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

env: $(READY) ## make the environment in .venv, with exactly the tested versions

tutorial: $(READY) ## run the EViT notebook, print its verdict, make a readable page of it
	$(BIN)/tokenkit assets dinov2-vits14
	$(BIN)/tokenkit run evit --html --verdict

test: $(READY) ## run all tests; the notebooks run through papermill in them
	$(BIN)/python -m pytest

export: $(READY) ## after editing notebooks: make the library, the catalog and the pages that follow from them
	$(BIN)/nbdev_export
	$(BIN)/python -c "from tokenkit.core.docs import update; update()"

outputs: $(READY) ## run changed notebooks on the cpu lane and store their outputs
	$(BIN)/tokenkit run --all --in-place

docs: $(READY) ## build the site with Quarto (which must be installed)
	quarto render

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

lock: ## choose new exact versions (needs uv)
	uv pip compile setup.py --all-extras --universal --python-version 3.10 --no-header --no-annotate --upgrade -o requirements.lock

clean: ## remove everything that these commands make
	rm -rf $(VENV) _runs _docs dist build *.egg-info

.PHONY: help env tutorial test export outputs docs lab lock clean
