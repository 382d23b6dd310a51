"""What a trained network says about image files: `cotnet-ext predict` without its shell.

`images` reads and prepares files as the network was evaluated, `classify` runs it over them,
`attention` takes the weights of its contextual layers, and `picture` draws them.
"""

from .attention import attention_layers, attention_of, default_layers
from .classify import Prediction, classify, load_classifier, read_labels
from .images import ImageError, Preparation, find_images

__all__ = [
    "ImageError",
    "Prediction",
    "Preparation",
    "attention_layers",
    "attention_of",
    "classify",
    "default_layers",
    "find_images",
    "load_classifier",
    "read_labels",
]
