"""Trains a network on folders of images or on scikit-learn's digits, on one or many devices.

    python examples/train.py --config examples/configs/digits.yaml
    torchrun --nproc-per-node 8 examples/train.py --config examples/configs/cotnet50.yaml --data DIR

docs/training.md says the rest; the parts are in the folder `training` beside this file.
"""

import sys

from training.main import main

if __name__ == "__main__":
    sys.exit(main())
