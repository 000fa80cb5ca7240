"""The arithmetic that an exact sweep cannot avoid, and how fast this machine does arithmetic.

The floor of a point: layers from the edit on, positions from the edit on, and the last layer for the last query only.
Attention is causal. Norms, rotary embedding and softmax are not counted, nor is what a sweep computes once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loops import SWEEPS, Point, Setting
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Clock = Callable[[], float]


@dataclass(frozen=True)
class Costs:
    """Arithmetic of a language model without grouped queries, in operations; attention is causal."""

    width: int
    mlp: int
    layers: int
    length: int
    vocabulary: int

    def layer(self, inputs: int, outputs: int, queries: range) -> float:
        """A layer with keys and values of some positions, and all else of others, whose queries see all before them."""
        keys = 4 * self.width**2 * inputs
        rest = (4 * self.width**2 + 6 * self.width * self.mlp) * outputs
        return keys + rest + 4 * self.width * sum(position + 1 for position in queries)

    def from_layer(self, first: int, start: int) -> float:
        """All layers from one on and all positions from one on; the last layer for the last query."""
        if first >= self.layers:
            return 0.0
        new, last = self.length - start, range(self.length - 1, self.length)
        through = (self.layers - 1 - first) * self.layer(new, new, range(start, self.length))
        return through + self.layer(new, 1, last)

    def of(self, name: str, point: Point) -> float:
        """What a point needs at least: everything behind its edit, and the logits of the last position."""
        layer, which = point
        logits = 2 * self.width * self.vocabulary
        if SWEEPS[name] != "z":
            return self.from_layer(layer + (name == "post"), which) + logits
        start = 0 if name == "heads" else self.length - 1
        here = 1 if layer == self.layers - 1 else self.length - start
        rest = (2 * self.width**2 + 6 * self.width * self.mlp) * here  # the output matrix and the MLP of its own layer
        return rest + self.from_layer(layer + 1, start) + logits

    def full(self) -> float:
        """A forward pass of a row, with the logits of its last position."""
        every = self.layer(self.length, self.length, range(self.length))
        return every * self.layers + 2 * self.width * self.vocabulary


def fastest(call: Callable[[], Any], clock: Clock, times: int, cuda: bool) -> float:
    """The shortest of some times of a call, after one that warms up."""
    found = []
    for _ in range(times + 1):
        start = clock()
        call()
        if cuda:
            torch.cuda.synchronize()
        found.append(clock() - start)
    return min(found[1:])


def forward_rate(at: Setting, costs: Costs, clock: Clock, rows: int = 16) -> float:
    """Operations a second of a full forward pass of many rows, from their embeddings."""
    words = at.hf.get_input_embeddings()(at.given["input_ids"]).expand(rows, -1, -1)

    def call() -> Any:
        with torch.no_grad():
            return at.hf(inputs_embeds=words, use_cache=False, logits_to_keep=1).logits

    return rows * costs.full() / fastest(call, clock, 2, at.cuda)


def product_rate(at: Setting, costs: Costs, clock: Clock, rows: int = 16) -> float:
    """Operations a second of one matrix product of the MLP's size."""
    how: dict[str, Any] = {"device": at.vlm.device, "dtype": at.vlm.dtype}
    left, right = torch.randn(rows * at.length, costs.width, **how), torch.randn(costs.width, costs.mlp, **how)
    best = fastest(lambda: left @ right, clock, 5, at.cuda)
    return 2 * rows * at.length * costs.width * costs.mlp / best


def tower_share(at: Setting, costs: Costs) -> float:
    """How much of a full pass the vision tower and the projector are."""
    # Only the plain kernel is made of operations that torch counts on every device.
    with FlopCounterMode(display=False) as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        at.hf.get_image_features(pixel_values=at.given["pixel_values"])
    return counted.get_total_flops() / (counted.get_total_flops() + costs.full())
