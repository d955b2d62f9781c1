# Every target makes or refreshes .venv by itself, and only when settings.ini or constraints.txt changed.
PYTHON ?= python3
BIN := .venv/bin
SETUP := settings.ini setup.py constraints.txt

.PHONY: help demo test bench docs lab export clean

help:
	@echo "make demo   train four small networks, three of them against attacks, and measure each: a table and a figure"
	@echo "make test   all tests"
	@echo "make bench  how fast: ratios against plain loops and the machine's limit, kept in results/ (minutes)"
	@echo "make docs   the documentation site, in _docs/"
	@echo "make lab    JupyterLab with the package installed"
	@echo "make export notebooks -> superposition_lc/ and README.md, cleaned"
	@echo "make clean  remove everything that make built"

.venv/run: $(SETUP)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: $(SETUP)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch .venv/run $@

demo: .venv/run
	$(BIN)/superposition-lc demo

test: .venv/dev
	$(BIN)/python -m pytest -n logical --dist worksteal  # a process a core

bench: .venv/run
	$(BIN)/python benchmarks/bench.py

docs: .venv/dev
	$(BIN)/python docs/build.py

lab: .venv/dev
	$(BIN)/jupyter lab nbs

export: .venv/dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python docs/readme.py

clean:
	rm -rf .venv _docs _proc build dist *.egg-info .pytest_cache .hypothesis demo
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
