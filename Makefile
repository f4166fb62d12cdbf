# make demo   set everything up and run the whole job on real handwritten digits
# make test   set everything up and run the tests

PYTHON ?= python3
ENV := .venv
RUN := $(ENV)/bin/python

.PHONY: demo test bench lint format setup clean

demo: setup
	$(RUN) -m engine.demo

test: setup
	$(RUN) -m pytest -q

bench: setup
	$(RUN) -m pytest -q --benchmark-only --benchmark-quiet --benchmark-record=benchmarks/results

lint: setup
	$(ENV)/bin/ruff check
	$(ENV)/bin/ruff format --check
	$(RUN) -m mypy
	$(ENV)/bin/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc')

format: setup
	$(ENV)/bin/ruff check --fix
	$(ENV)/bin/ruff format
	$(ENV)/bin/clang-format -i $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc')

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
