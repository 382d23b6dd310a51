"""Benchmarks of cotnet_ext against plain PyTorch. `python -m benchmarks`; method: README.md."""

import os

# Read by PyTorch's profiler when torch is imported: no lines of its own between ours.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# Read by Inductor: compilers are threads of the process. A pool of them would still be starting, at
# the cost of whatever is timed beside it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
