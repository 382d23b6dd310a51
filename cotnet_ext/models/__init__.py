"""The networks of Contextual Transformer networks: CoTNet, CoTNeXt and SE-CoTNetD.

`create_model(name, ...)` builds one, `list_models()` has the names, and every name is a function
too: `cotnet50(num_classes=10)`. Importing this module registers all of them with timm, where timm
is installed: `timm.create_model("cotnet50", num_classes=10)`.
"""

from .factory import ENTRY_POINTS, create_model
from .features import FeatureInfo
from .network import CoTNet, CoTNetFeatures
from .table import VARIANTS, Variant, get_variant, list_models
from .timm_registry import register as _register_with_timm
from .weights import identify

globals().update(ENTRY_POINTS)
_register_with_timm()

__all__ = [
    "CoTNet",
    "CoTNetFeatures",
    "FeatureInfo",
    "VARIANTS",
    "Variant",
    "create_model",
    "get_variant",
    "identify",
    "list_models",
    *ENTRY_POINTS,
]
