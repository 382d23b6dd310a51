"""1x1 convolutions of maps as products of matrices, and their gradients, where autograd is off.

NCHW: a product for each image, `[O, C] @ [C, H*W]`. channels_last: one for all pixels,
`[N*H*W, C] @ [C, O]`. Groups are products of their own. No map is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Products:
    """The products of maps in one layout.

    Args:
        groups: of the convolutions; a weight is `[O, C // groups]`.
        channels_last: the layout of every map.
    """

    groups: int
    channels_last: bool

    def forward(
        self, maps: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None = None
    ) -> Tensor:
        """The sum of the convolutions of the maps, each with its weight, `[N, O, H, W]`."""
        result = self._add(None, zip(weights, maps, strict=True))
        return result if bias is None else result.add_(bias.view(-1, 1, 1))

    def grad_map(
        self, grads: Sequence[Tensor], weights: Sequence[Tensor], onto: Tensor | None = None
    ) -> Tensor:
        """The gradient of a map that entered several convolutions, added to `onto` in place."""
        return self._add(onto, zip(map(self._transposed, weights), grads, strict=True))

    def grad_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        """`[O, C // groups]`, summed over images and pixels."""
        if self.channels_last:
            parts = zip(self._columns(grad), self._columns(x), strict=True)
            found = [rows.t().mm(columns) for rows, columns in parts]
            return torch.cat(found) if self.groups > 1 else found[0]
        rows, columns = self._images(grad), self._images(x).transpose(1, 2)
        found = rows.bmm(columns)
        return found.view(grad.shape[0], -1, found.shape[2]).sum(0)

    def _transposed(self, weight: Tensor) -> Tensor:
        """`[C, O // groups]`: the weight of the gradient."""
        if self.groups == 1:
            return weight.t()
        return weight.view(self.groups, -1, weight.shape[1]).transpose(1, 2).flatten(0, 1)

    def _add(self, total: Tensor | None, terms) -> Tensor:
        for weight, x in terms:
            first = total is None
            if first:
                total = self._empty(x, weight.shape[0])
            if self.channels_last:
                rows = weight.chunk(self.groups)
                for to, pixels, own in zip(
                    self._columns(total), self._columns(x), rows, strict=True
                ):
                    to.addmm_(pixels, own.t(), beta=0 if first else 1)
            else:
                own = self._for_each_image(weight, x.shape[0])
                self._images(total).baddbmm_(own, self._images(x), beta=0 if first else 1)
        return total

    def _for_each_image(self, weight: Tensor, n: int) -> Tensor:
        """`[n*groups, O // groups, C // groups]` of a weight; a view when there is one group."""
        if self.groups == 1:
            return weight.expand(n, -1, -1)
        own = weight.view(self.groups, -1, weight.shape[1])
        return own.expand(n, -1, -1, -1).flatten(0, 1)

    def _empty(self, like: Tensor, channels: int) -> Tensor:
        n, _, h, w = like.shape
        if self.channels_last:
            return like.new_empty(n, h, w, channels).permute(0, 3, 1, 2)
        return like.new_empty(n, channels, h, w)

    def _images(self, x: Tensor) -> Tensor:
        """`[N*groups, C // groups, H*W]`."""
        n, c, h, w = x.shape
        return x.view(n * self.groups, c // self.groups, h * w)

    def _columns(self, x: Tensor) -> Sequence[Tensor]:
        """For each group `[N*H*W, C // groups]`."""
        n, c, h, w = x.shape
        return x.permute(0, 2, 3, 1).view(n * h * w, c).chunk(self.groups, dim=1)
