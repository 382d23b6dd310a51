"""Benchmarks of cotnet_ext against plain PyTorch. `python -m benchmarks`; method: README.md."""

import os

# Read by PyTorch's profiler when torch is imported: no lines of its own between ours.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
