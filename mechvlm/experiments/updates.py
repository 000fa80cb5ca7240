"""What a layer does, its update, in one run beside another: measured where the model runs, span by span.

Rule this module guards: of the residual streams nothing is kept but measures; one layer's are held at a time.

>>> by_span(torch.tensor([[[1.0, 3.0]]]), [[0, 1]])
tensor([[[2.]]])
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.sites import Site

MEASURES = ("update_cosine", "state_cosine", "norm", "distance")


def compared(
    before: Float[Tensor, "row pos d_model"], after: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, "row measure pos"]:
    """What a layer does in each row, beside what it does in row 0: the numbers of `MEASURES`.

    Args:
        before, after: the residual streams that enter and leave the layer, real run first.

    Example:
        >>> before = torch.zeros(2, 1, 2)
        >>> compared(before, torch.tensor([[[3.0, 4.0]], [[4.0, 3.0]]]))[1, :2, 0]  # 24 / 25
        tensor([0.9600, 0.9600], dtype=torch.float64)
    """
    left, entered = after.double(), before.to(after.device).double()
    apart = (left - left[:1]).norm(dim=-1)
    return torch.stack([_cosine(left - entered), _cosine(left), left.norm(dim=-1), apart], 1)


def _cosine(x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos"]:
    """The cosine of each row's vectors with row 0's; not a number where either is zero."""
    unit = x / x.norm(dim=-1, keepdim=True)
    return (unit * unit[:1]).sum(-1)


def by_span(
    values: Float[Tensor, "row measure pos"], spans: Sequence[Sequence[int]]
) -> Float[Tensor, "row measure span"]:
    """Means over the positions of spans, without what is not a number; not a number where nothing is left.

    Example:
        >>> by_span(torch.tensor([[[1.0, float("nan"), 3.0]]]), [[0, 1, 2], [1]])
        tensor([[[2., nan]]])
    """
    return torch.stack([values[..., list(held)].nanmean(-1) for held in spans], -1)


class Reduced:
    """Readings of layers that keep nothing but measures by span: what entered a layer is let go when it has left.

    Args:
        spans: positions.
        norm: the final norm.
    """

    def __init__(self, spans: Sequence[Sequence[int]], norm: Callable[[Tensor], Tensor]) -> None:
        self.spans, self.norm = spans, norm
        self.before: Any = None

    def reads(self, layers: int) -> dict[Site, Callable[[Tensor], Tensor]]:
        """What to read of each layer's input and output."""
        inputs: dict[Site, Callable[[Tensor], Tensor]] = {Site("resid_pre", n): self.enters for n in range(layers)}
        return inputs | {Site("resid_post", n): self.last if n == layers - 1 else self.leaves for n in range(layers)}

    def enters(self, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
        """Hold what enters a layer until it leaves."""
        self.before = x
        return x[:, 0, 0]

    def leaves(self, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row measure span"]:
        """The measures of a layer."""
        return by_span(compared(self.before, x), self.spans)

    def last(self, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row twice measure span"]:
        """Those of the last layer, with its output as it is and after the final norm."""
        return torch.stack([self.leaves(x), self.leaves(self.norm(x).to(x.device))], 1)
