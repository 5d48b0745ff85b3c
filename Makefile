# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: install demo test check bench clean

install: $(INSTALLED)

# One constraints file pins every package; torch comes in the same call as what depends on it.
$(INSTALLED): pyproject.toml constraints.txt common/kernels.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data,dashboard,tensorboard,environment,pictures,dev]'
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/fedtopk demo --out runs/demo

# Two processes: much of the suite waits for real processes. A file's tests share what they start.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Device updates per second of the default workload, in the report's client_updates_per_second.
bench: $(INSTALLED)
	$(BIN)/fedtopk simulate --out $$(mktemp -d)/run --set training.rounds=60 --set objective.warmup_rounds=30 --format json

clean:
	rm -rf $(VENV) runs
