# Everything starts here: `make demo`, `make test`. The environment is made on first use, pinned by constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out

.PHONY: demo test test-slow test-faults check docs bench-speed bench-export install clean

demo: install
	$(BIN)/compresskit compress --method low-rank --ratio 19 --output $(OUT)/low-rank-19x --overwrite
	$(BIN)/compresskit bench --quick --output $(OUT)/bench --overwrite
	@echo "Demo done. Three methods at 8x, compared: open $(OUT)/bench/index.html (tables: $(OUT)/bench/README.md)."

# One process per core, one thread each: small models gain nothing from more threads. One process: `pytest` alone.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Every family with every head and method, of which the ordinary tests take pairs, many random cases, the long pages.
test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 -m sweep

# Faults that are really caused, five times each; some need root for a small file system of their own. Up to an hour.
test-faults: install
	FAULT_TIMES=5 $(BIN)/python -m pytest -q tests/faults

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ as a site that needs no server: open site/index.html.
docs: install
	$(BIN)/mkdocs build --strict --quiet

# About half an hour on an otherwise idle machine; 8 GB of disk. Other packages to compare with come first.
bench-speed: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[experiments]'
	$(BIN)/python experiments/speed.py
	$(BIN)/python experiments/contraction.py
	$(BIN)/python experiments/profile_layers.py
	$(BIN)/python experiments/compress.py
	$(BIN)/python experiments/memory.py

# For example: make bench-export DENSE=teacher STUDENTS="low-rank-8x low-rank-19x" DATA=GLUE
# In pieces: STEPS="write score" on a machine that does other work, then STEPS="cold time" on an idle one.
bench-export: install
	$(BIN)/python experiments/export.py --dense $(DENSE) --students $(STUDENTS) --task sst2 --data $(DATA) \
		--shapes 1x128 1x32 1x512 32x32 32x128 32x512 --threads 1 2 --steps $(or $(STEPS),write score cold time)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,docs,openvino,static]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build dist site .pytest_cache .mypy_cache .ruff_cache
