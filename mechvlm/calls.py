"""What attention modules hand to their kernels, in one form: q, k, v, mask, scale, and how to write them back.

Shapes: `q` is `batch head query d_head`, `k` and `v` are `batch kv_head key d_head`, `z` is `batch pos head d_head`.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from mechvlm.masks import Sees, sees_of
from mechvlm.sites import RAW_KINDS
from mechvlm.towers import PROJECTIONS, Block

Offer = Callable[[str, Tensor], Tensor]


def call_of(module: Any, block: Block, offer: Offer, length: int | None = None) -> "Call | Chunked":
    """The attention call of a module, inside a trace.

    Args:
        length: how many positions the text has by now; None where the keys are not those of the text.
    """
    return Chunked(module, offer) if block.interface is None else Call(module, block.interface, block.causal, length)


def projected(module: Any, block: Block, kinds: set[str]) -> dict[str, Tensor]:
    """What a language model's heads project the stream to, by kind, inside a trace and before the call is looked at."""
    wanted = [(kind, name) for kind, name in zip(RAW_KINDS, PROJECTIONS, strict=True) if kind in kinds]
    if wanted and block.interface is not None:
        attrgetter(block.interface)(module.source)  # named before the projections run, or it is not known afterwards
    return {kind: attrgetter(name)(module).output for kind, name in wanted}


MASKED = ("sdpa", "eager")
"""The kernels that take a mask to add to the scores."""

WIDEST = {"flash_attention_2": 256}
"""How wide the heads of some kernels may be."""


def kernel_of(module: Any) -> str:
    """The attention implementation of a module."""
    return module._module.config._attn_implementation


def takes_mask(handed: Any) -> bool:
    """Whether what a kernel is handed says of each query and key whether they may meet."""
    return handed is not None and (not isinstance(handed, Tensor) or handed.ndim > 2)


class Call:
    """The arguments of one attention call, by name, and how to write them back.

    Attributes:
        ways: how its kernel can be asked for a change of scores; any other computes the layer anew.
        shown_anew: whether `result` is a view that the model itself does not go on with.
        cap: scores are c tanh(x / c); None where they are x.
        sees: which keys each query may look at, biases included once they are added.
        own: the same as the model has it.
        missing: how many first keys a sliding window's cache has let go of. They are shown as masked, so that a key's
            index is its position.
        unfilled: how many keys behind the text a static cache has room for. They are not shown.
    """

    shown_anew = False

    def __init__(self, module: Any, interface: str, causal: bool, length: int | None) -> None:
        self.op = attrgetter(interface)(module.source)
        args, self.named = self.op.inputs
        self.args = list(args)
        self.in_args = len(self.args) > 4
        self.q, self.k, self.v = self.args[1:4]
        self.handed = self.args[4] if self.in_args else self.named.get("attention_mask")
        self.mask: Tensor | None = None
        there = self.k.shape[2]
        self.missing = 0 if length is None else max(0, length - there)
        self.unfilled = 0 if length is None else max(0, there - length)
        if self.unfilled:
            self.k, self.v = (x[:, :, : there - self.unfilled] for x in (self.k, self.v))
        if self.missing:
            self.k, self.v = (pad(x, (0, 0, self.missing, 0)) for x in (self.k, self.v))
        flag, scale = self.named.get("is_causal"), self.named.get("scaling")
        follows = not takes_mask(self.handed) and (causal if flag is None else bool(flag))
        self.sees = sees_of(self.handed, self.q, self.k, follows, self.named.get("sliding_window"), self.missing)
        self.own = self.sees
        self.scale: float = self.q.shape[-1] ** -0.5 if scale is None else scale
        self.cap: float | None = self.named.get("softcap")
        masks = kernel_of(module) in MASKED and (self.handed is None or takes_mask(self.handed))
        by_mask = ("mask",) if masks and self.sees.window is None else ()
        # A feature's product would be capped with the scores.
        self.ways: tuple[str, ...] = (*by_mask, "feature") if self.cap is None else by_mask
        self.widest = WIDEST.get(kernel_of(module))

    def offer(self, offer: Offer) -> bool:
        """Offer q, k and v; whether one changed."""
        old = self.q, self.k, self.v
        self.q, self.k, self.v = offer("q", self.q), offer("k", self.k), offer("v", self.v)
        return any(new is not one for new, one in zip((self.q, self.k, self.v), old, strict=True))

    def add(self, mask: Float[Tensor, "rows heads query key"]) -> None:
        """Let another mask decide, which is added to the scores."""
        self.mask, self.sees = mask, Sees(self.sees.query, self.sees.key, handed=mask)

    def write(self) -> None:
        """Hand the changed arguments to the kernel."""
        self.args[1:4] = [self.q, *(self.as_cached(x, at) for x, at in ((self.k, 2), (self.v, 3)))]
        mask = self.handed
        if self.mask is not None:
            mask = pad(self.mask[..., self.missing :], (0, self.unfilled), value=-torch.inf)
        if self.in_args:
            self.args[4] = mask
        elif mask is not None:
            self.named = {**self.named, "attention_mask": mask}
        self.op.inputs = (tuple(self.args), self.named)

    def as_cached(self, x: Tensor, at: int) -> Tensor:
        """Keys or values as the cache has them: without those it let go of, and with room for those to come."""
        own = x[:, :, self.missing :]
        if not self.unfilled:
            return own
        room = self.op.inputs[0][at][:, :, -self.unfilled :]
        return torch.cat([own, pad(room, (0, own.shape[-1] - room.shape[-1]))], 2)

    def result(self) -> Tensor:
        """The kernel's z."""
        return self.op.output[0]

    def put(self, z: Tensor) -> None:
        """Let the model go on with another z."""
        self.op.output = (z, *self.op.output[1:])


class Chunked:
    """The attention of a tower that packs all images into one sequence and calls its kernel for each image or window.

    Queries and keys are those of the whole sequence, as rotary embedding leaves them; the mask says which may meet.
    """

    ways: tuple[str, ...] = ()
    shown_anew = True
    cap = None
    widest = None

    def __init__(self, module: Any, offer: Offer) -> None:
        self.turned = module.source.apply_rotary_pos_emb_vision_0  # named before the module runs, or it is not known
        self.module, own = module, module._module
        heads, self.scale = own.num_heads, own.scaling
        borders = module.inputs[1]["cu_seqlens"]
        projected = module.qkv.output  # pos (3 head d_head)
        length = projected.shape[0]
        three = projected.reshape(length, 3, heads, -1)
        old = three[:, 2].transpose(0, 1)[None]
        self.v = offer("v", old)
        if self.v is not old:
            values = self.v[0].transpose(0, 1)[:, None]
            module.qkv.output = torch.cat([three[:, :2], values], 1).reshape(projected.shape)
        self.q, self.k = (one.transpose(0, 1)[None] for one in self.turned.output)
        stretch = torch.bucketize(torch.arange(length, device=borders.device), borders, right=True)
        self.sees = self.own = Sees(length, length, stretch=stretch)

    def offer(self, offer: Offer) -> bool:
        """Offer q and k, as v was when it was made; whether one changed."""
        old = self.q, self.k
        self.q, self.k = offer("q", self.q), offer("k", self.k)
        return self.q is not old[0] or self.k is not old[1]

    def write(self) -> None:
        """Let the model go on with the changed queries and keys."""
        self.turned.output = tuple(one[0].transpose(0, 1) for one in (self.q, self.k))

    def result(self) -> Tensor:
        """What the heads took in, before the output matrix."""
        flat = self.module.proj.input
        return flat.reshape(1, flat.shape[0], self.q.shape[1], -1)

    def put(self, z: Tensor) -> None:
        """Let the model go on with another z."""
        self.module.proj.input = z.reshape(z.shape[1], -1)
