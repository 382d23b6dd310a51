"""Which maps of a network can be taken out, in the words of timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FeatureInfo:
    """Channels and strides of the maps that a network returns, as timm's class of this name.

    Args:
        info: for each map of the network a dict with `num_chs` (channels), `reduction` (pixels of
            the image per pixel of the map, along each side) and `module` (the name of its module).
        out_indices: those that are returned.
    """

    def __init__(self, info: list[dict[str, Any]], out_indices: tuple[int, ...]) -> None:
        self.info = info
        self.out_indices = out_indices

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """One entry of the maps `idx`; of all that are returned if None, of one map if an int."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)

    def get_dicts(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The dicts of the maps that are returned, or these keys of them."""
        chosen = [self.info[i] for i in self.out_indices]
        return chosen if keys is None else [{key: one[key] for key in keys} for one in chosen]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


def check_out_indices(value: Any, count: int) -> tuple[int, ...]:
    """`out_indices` as places from the start, ascending; negative ones count from the end.

    As in timm, an int asks for that many last maps.
    """
    what = f"out_indices must be an int or a sequence of ints from {-count} to {count - 1}"
    if isinstance(value, bool) or not isinstance(value, (int, Sequence)) or isinstance(value, str):
        raise TypeError(f"{what}, got {value!r}")
    if isinstance(value, int):
        if not 1 <= value <= count:
            raise ValueError(f"out_indices as an int must be from 1 to {count}, got {value}")
        return tuple(range(count - value, count))
    if any(isinstance(index, bool) or not isinstance(index, int) for index in value):
        raise TypeError(f"{what}, got {value!r}")
    places = sorted(index % count for index in value if -count <= index < count)
    if len(places) != len(value) or len(set(places)) != len(places) or not places:
        raise ValueError(f"{what}, each once, got {value!r}")
    return tuple(places)
