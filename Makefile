# What a newcomer runs. Each target sets up what it needs first: a virtual environment with PyTorch,
# the package compiled from this folder, and its tools. The second call goes straight to work.

# Where to install, and with which Python.
VENV   ?= .venv
PYTHON ?= python3
# Which PyTorch to install, in pip's words, such as TORCH=torch==2.10.0. When $(PYTHON) has a PyTorch
# that fits, that one is used and nothing is fetched.
TORCH  ?= torch
# More arguments for pytest, the demo or the benchmarks: make test ARGS="-k softmax"
ARGS   ?=

BIN := $(VENV)/bin
# Tools of the environment, and behind them those of the Python that lends its packages.
export PATH := $(abspath $(BIN)):$(dir $(shell command -v $(PYTHON))):$(PATH)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml setup.py cotnet_ext/_version.py $(wildcard build_backend/*.py) \
  $(shell find csrc -type f)

.PHONY: help setup demo test bench lint cuda-build clean
.DELETE_ON_ERROR:

help:  ## Print this list
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/ready  ## Make the virtual environment and install the package into it

demo: setup  ## Run the modules on photographs, train a small network, draw a picture of both
	cotnet-ext demo $(ARGS)

test: setup  ## Run all tests
	$(BIN)/python -m pytest $(ARGS)

bench: setup  ## Measure every operator and module against PyTorch, write tables and plots
	$(BIN)/python -m benchmarks $(ARGS)

lint: setup  ## Check the style of the Python code
	ruff check .

cuda-build: setup  ## Compile the CUDA kernels too; stops with the reason where that is impossible
	COTNET_EXT_CUDA=1 $(PIP) install --verbose --no-deps --editable .

clean:  ## Remove everything that was built, and the virtual environment
	rm -rf build *.egg-info cotnet_ext/_C*.so $(VENV)

# The package is installed in place: edits of Python files need no second install, edits of C++ files
# cause one, which compiles the changed files only.
$(VENV)/ready: $(VENV)/torch $(INPUTS)
	@touch $@.since  # what is edited from here on needs another turn
	$(PIP) install --editable '.[dev]'
	@mv $@.since $@

# The .pth file lends the environment what $(PYTHON) has installed, if there is a torch among it.
$(VENV)/torch: $(VENV)/wanted
	$(PYTHON) -m venv $(VENV)
	@lender=$$($(PYTHON) -c 'import torch, os; print(os.path.dirname(torch.__path__[0]))' 2>/dev/null) \
	  && echo "$$lender" > $$(echo $(VENV)/lib/python*/site-packages)/lent.pth || true
	$(PIP) install '$(TORCH)' 'torch>=2.10'
	@touch $@

# Changes when TORCH does, so that another TORCH is installed and compiled against.
$(VENV)/wanted: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
FORCE:
