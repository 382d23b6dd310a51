# What a newcomer runs. Each target sets up what it needs first: a virtual environment with PyTorch,
# the package compiled from this folder, and its tools. The second call goes straight to work.

# Where to install, and with which Python.
VENV   ?= .venv
PYTHON ?= python3
# Which PyTorch to install, in pip's words, such as TORCH=torch==2.10.0. When $(PYTHON) has a PyTorch
# that fits, that one is used and nothing is fetched.
TORCH  ?= torch
# More arguments for pytest, the demo, the benchmarks or gpu-check: make test ARGS="-k softmax"
ARGS   ?=
# The same for `make cuda-build`: an environment of its own, with a PyTorch that is a CUDA build.
CUDA_VENV  ?= .venv-cuda
TORCH_CUDA ?= torch==2.11.0

BIN := $(VENV)/bin
# Tools of the environment, and behind them those of the Python that lends its packages.
export PATH := $(abspath $(BIN)):$(dir $(shell command -v $(PYTHON))):$(PATH)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml setup.py cotnet_ext/_version.py $(wildcard build_backend/*.py) \
  $(shell find csrc -type f)

.PHONY: help setup demo test bench lint cuda-build gpu-check clean
.DELETE_ON_ERROR:
.PRECIOUS: %/torch %/wanted

help:  ## Print this list
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/ready  ## Make the virtual environment and install the package into it

demo: setup  ## Run the modules on photographs, train a small network, draw a picture of both
	cotnet-ext demo $(ARGS)

# A file of tests stays in one process, so that what the file builds is built once.
test: setup  ## Run all tests
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

bench: setup  ## Measure every operator and module against PyTorch, write tables and plots
	$(BIN)/python -m benchmarks $(ARGS)

lint: setup  ## Check the style of the Python code
	ruff check .

cuda-build: $(CUDA_VENV)/torch  ## Compile the CUDA kernels, with nvcc, and check the machine code; needs no GPU
	COTNET_EXT_CUDA=1 $(CUDA_VENV)/bin/python -m pip --disable-pip-version-check \
	  install --verbose --no-deps --force-reinstall .
	$(CUDA_VENV)/bin/python tests/cuda_gate.py

gpu-check:  ## Build, test and measure on this machine's GPU with the PyTorch of $(PYTHON), offline
	$(PYTHON) tests/gpu_check.py $(ARGS)

clean:  ## Remove everything that was built, and the virtual environments
	rm -rf build *.egg-info cotnet_ext/_C*.so $(VENV) $(CUDA_VENV)

# The package is installed in place: edits of Python files need no second install, edits of C++ files
# cause one, which compiles the changed files only. The PyTorch stays whatever other packages prefer.
$(VENV)/ready: $(VENV)/torch $(INPUTS)
	@touch $@.since  # what is edited from here on needs another turn
	$(PIP) install --editable '.[dev]' "torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')"
	@mv $@.since $@

# The .pth file lends the environment what $(PYTHON) has installed, if there is a torch among it (for
# CUDA: one that is a CUDA build).
%/torch: %/wanted
	$(PYTHON) -m venv $*
	@lender=$$($(PYTHON) -c 'import torch, os; $(FITS); print(os.path.dirname(torch.__path__[0]))' 2>/dev/null) \
	  && echo "$$lender" > $$(echo $*/lib/python*/site-packages)/lent.pth || true
	$*/bin/python -m pip --disable-pip-version-check install '$(TORCH)' 'torch>=2.10'
	@touch $@

# Changes when TORCH does, so that another TORCH is installed and compiled against.
%/wanted: FORCE
	@mkdir -p $*
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
FORCE:

$(CUDA_VENV)/%: override TORCH = $(TORCH_CUDA)
$(CUDA_VENV)/torch: FITS = assert torch.version.cuda
FITS = pass
