"""The networks under their names in timm, where timm is installed.

timm takes seconds to import, and cannot be imported at all beside a torchvision that does not fit.
So it is not imported here: an imported timm learns the names at once, another one as soon as the
program imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import sys
from typing import Any

from torch import nn

from .factory import create_model
from .table import VARIANTS

_logger = logging.getLogger(__name__)


def register() -> None:
    """Makes the networks known to timm, now or when it is imported."""
    if sys.modules.get("timm") is not None:
        _tell_timm()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds timm as the others do, and calls `_tell_timm` once it has been imported."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "timm" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_tell(module: Any) -> None:
            try:
                execute(module)
            except Exception as error:  # theirs, and for the program to deal with
                _logger.debug("timm cannot be imported, so it has no CoTNets: %s", error)
                raise
            _tell_timm()

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def _tell_timm() -> None:
    try:
        from timm.models import generate_default_cfgs, is_model, register_model
    except Exception as error:  # half imported, or a timm without these functions
        _logger.debug("timm cannot take the CoTNets: %s", error)
        return
    global default_cfgs
    default_cfgs = generate_default_cfgs(
        {name: variant.pretrained_cfg() for name, variant in VARIANTS.items()}
    )
    for name in VARIANTS:
        if not is_model(name):
            register_model(_entry_point(name))


default_cfgs: dict[str, Any] = {}  # where `register_model` looks for them
__all__ = ["register"]  # to which it adds the names


def _entry_point(name: str) -> Any:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        from timm.models import resolve_pretrained_cfg

        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        if pretrained and not cfg.file:
            raise RuntimeError(
                f"no weights of {name} can be downloaded: its authors publish them in their own "
                "format only. Take the .pth.tar that the README of JDAI-CV/CoTNet links, and give "
                "its path as pretrained_cfg_overlay={'file': PATH}"
            )
        model = create_model(name, checkpoint=cfg.file if pretrained else None, **options)
        model.pretrained_cfg = model.default_cfg = cfg.to_dict()
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{VARIANTS[name].title}, as `cotnet_ext.models.{name}`."
    return build
