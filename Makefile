# make demo   set everything up and run the whole job on real handwritten digits
# make test   set everything up and run the tests
# make gpu    on a machine with an NVIDIA GPU: test and measure there

PYTHON ?= python3
ENV := .venv
RUN := $(ENV)/bin/python
CPP = $(shell git ls-files $(foreach kind,cpp h inc cu cuh,'*.$(kind)'))

.PHONY: demo test asan bench gpu lint format setup clean

demo: setup
	$(RUN) -m engine.demo

test: setup
	$(RUN) -m pytest -q -n auto --dist loadfile

# The kernels watch every access to memory, in a build of its own. What they find ends the run, so pytest must not hold
# back their report. PyTorch's bfloat16 convolutions read memory they have not written, and the tests compare with them:
# it is zero here.
SANITIZED := build/sanitized
RUNTIMES = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
WATCHED = env LD_PRELOAD="$(RUNTIMES)" PYTHONPATH=$(SANITIZED) PYTHONSAFEPATH=1 \
	ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1000000:malloc_fill_byte=0 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
USES_SANITIZERS = from kernels import backends; assert "sanitize" in backends.extension.build_info()["flags"]

asan: setup
	@if test ! -e "$(firstword $(RUNTIMES))"; then echo "asan: skipped, $(CXX) has no libasan.so"; else set -ex; \
		METAPRUNE_SANITIZE=1 CXX="$(CXX)" $(RUN) setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED); \
		$(WATCHED) $(RUN) -c '$(USES_SANITIZERS)'; \
		$(WATCHED) $(RUN) -m pytest -q --capture=sys --ignore=tests/kernels/gpu tests/kernels; \
	fi

bench: setup
	$(RUN) -m pytest -q --benchmark-only --benchmark-quiet --benchmark-record=benchmarks/results

# With GPU_PYTHON=python3 in what that Python has, without .venv and without a network.
gpu:
	@$(or $(GPU_PYTHON),$(PYTHON)) benchmarks/gpu.py --check
	@$(if $(GPU_PYTHON),,$(MAKE) setup)
	@$(or $(GPU_PYTHON),$(RUN)) benchmarks/gpu.py $(GPU_OPTIONS)

lint: setup
	$(ENV)/bin/ruff check
	$(ENV)/bin/ruff format --check
	$(RUN) -m mypy
	$(ENV)/bin/clang-format --dry-run --Werror $(CPP)

format: setup
	$(ENV)/bin/ruff check --fix
	$(ENV)/bin/ruff format
	$(ENV)/bin/clang-format -i $(CPP)

# The build needs torch, so it is installed before this project and the build is not isolated.
setup: $(ENV)/.installed

$(ENV)/.installed: pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	test -x $(RUN) || $(PYTHON) -m venv $(ENV)
	$(RUN) -m pip install -q -c constraints.txt setuptools wheel torch pybind11
	$(RUN) -m pip install -v -c constraints.txt --no-build-isolation -e '.[dev]' > $(ENV)/install.log 2>&1 \
		|| { tail -n 20 $(ENV)/install.log; exit 1; }
	@grep -o 'metaprune: no C++ kernels.*' $(ENV)/install.log | sort -u || true
	touch $@

clean:
	rm -rf build *.egg-info kernels/*.so
