# Every target makes the virtual environment that it needs; only python3 (3.10 or later) must exist.
#   make demo       the demo on a real photograph
#   make test       all tests; those that need a CUDA GPU are skipped, and say so
#   make test-gpu   the tests that need a CUDA GPU; fails where there is none
#   make lint       ruff, mypy, clang-format
#   make bench      KernelBench problems 82 to 85, then every depthwise layer of torchvision
#   make clean      remove what the other targets made

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Small tensors gain nothing from many threads, and the test processes run side by side.
TEST_ENV := OMP_NUM_THREADS=1
TEST_PROCESSES ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
KERNELBENCH_ARGS ?=

.PHONY: demo test test-gpu lint bench clean
# Two targets must never install into the one virtual environment at the same time.
.NOTPARALLEL:

demo: $(VENV)/.installed-bench
	$(PY) -m dwswap demo $(DEMO_ARGS)

test: $(VENV)/.installed-test
	$(TEST_ENV) $(PY) -m pytest tests -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-test
	@$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make test-gpu: torch sees no CUDA GPU; see dwswap doctor')"
	$(PY) -m pytest tests -m gpu $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	find csrc tests/host tests/emulator examples -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' \
	    | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

bench: $(VENV)/.installed-bench
	$(PY) examples/kernelbench.py $(KERNELBENCH_ARGS)
	$(PY) -m dwswap bench layers $(BENCH_ARGS)

clean:
	rm -rf build dist *.egg-info dwswap-demo dwswap-export gpu-checks .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dwswap tests examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
	if [ -f $(VENV)/.made-by-make ]; then rm -rf $(VENV); fi

$(PY):
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 10) else \
	    f'$(PYTHON) is {sys.version.split()[0]}; dwswap needs Python 3.10 or later: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	touch $(VENV)/.made-by-make

# One stamp per extra: pip runs again only when pyproject.toml has changed.
$(VENV)/.installed-%: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@
