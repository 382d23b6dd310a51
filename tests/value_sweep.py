"""Check values and gradients of every function on a cross-section of cases, in one process.

Run as a script, under an environment that changes how the kernels run: `test_determinism.py` lowers
the vector width this way.
"""

from __future__ import annotations

import itertools

import torch
from cases import CASES, REPRESENTATIVE
from checks import check_values
from oracle import FUNCTIONS
from tolerances import DTYPES

NAMES = ("stage1_64x56x56", "map_1x1", "row_1x19", "k4_even")
NAMES += ("narrow_k7_heads2", "narrow_k7_dilation2", "reflect_3x1")
MORE = tuple(CASES[name] for name in NAMES)


def main() -> None:
    torch.set_num_threads(2)
    cases = (*REPRESENTATIVE, *MORE)
    layouts = ("contiguous", "channels_last")
    count = 0
    for function, case, dtype, layout in itertools.product(FUNCTIONS, cases, DTYPES, layouts):
        strict = dtype.itemsize == 2
        check_values(
            function, case, dtype, torch.device("cpu"), maps=layout, grad=layout, strict=strict
        )
        count += 1
    print(f"{count} checks passed")


if __name__ == "__main__":
    main()
