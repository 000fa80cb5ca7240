"""The same sweep by three programs: a plain loop of full forward passes, `mv.sweep`, and a loop of TransformerLens.

Each point overwrites an activation by that of another prompt, with other words and another picture, and reads a logit
difference. The plain loop is the Hugging Face model with an ordinary torch hook, and shares nothing with mechvlm but
the activations that are put in.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from wide import Encoding, Wide

import mechvlm as mv
from mechvlm import bridge

METRIC = mv.logit_difference(7, 9)
SWEEPS = {"pre": "resid_pre", "post": "resid_post", "heads": "z", "last": "z"}
Point = tuple[int, int]


class Setting:
    """A model, the prompt that is patched and its inputs, and what another prompt's run had at the sites."""

    def __init__(self, made: Wide, lens: bool, full: bool, stride: int = 1) -> None:
        self.hf, self.vlm = made.model, mv.VLM(made.model)
        self.cuda = self.vlm.device.type == "cuda"
        self.given = self.moved(made.encoding(0))
        self.prompt, other = (self.vlm.prompt(encoding=given) for given in (self.given, self.moved(made.encoding(1))))
        self.layers, self.heads = self.vlm.shape.layers["text"], self.vlm.shape.heads["text"]
        self.length, self.exact = len(self.prompt), self.vlm.dtype == torch.float32
        self.positions = range((self.length - 1) % stride, self.length, stride)  # the last one among them
        self.modules = self.hf.get_submodule(self.vlm.arch.row.text).layers
        keeps = {"logits_to_keep": 1} if self.vlm.arch.row.keeps else {}
        self.call: dict[str, Any] = {**self.given, "use_cache": False, **keeps}
        wanted = [self.site(name, layer) for name in SWEEPS for layer in range(self.layers)]
        run = self.vlm.run(other, read=dict.fromkeys(wanted))
        self.source = {site: run[site] for site in run.values}
        self.settings: dict[str, Any] = {"fast": False} if full else {}
        known = lens and bridge.installed() and type(made.model).__name__ in bridge.supported()
        self.lens = bridge.bridged(self.vlm) if known else None

    def moved(self, given: Encoding) -> Encoding:
        """An encoding where the model is, its pixels in the model's type."""
        kinds = {name: self.vlm.dtype if x.is_floating_point() else x.dtype for name, x in given.items()}
        return {name: x.to(self.vlm.device, kinds[name]) for name, x in given.items()}

    def site(self, name: str, layer: int) -> mv.Site:
        """Where a sweep patches in a layer."""
        kind = SWEEPS[name]
        return mv.Site(kind if kind in self.vlm.shape.kinds["text"][layer] else f"cross_{kind}", layer)

    def points(self, name: str) -> list[Point]:
        """Of a sweep: layers and positions, or layers and heads."""
        return list(product(range(self.layers), range(self.heads) if SWEEPS[name] == "z" else self.positions))


def overwrite(at: Setting, name: str, point: Point, x: torch.Tensor) -> torch.Tensor:
    """The activation of a point, `batch pos d_model` or `batch pos head d_head`, with the other prompt's put in."""
    layer, which = point
    source, x = at.source[at.site(name, layer)], x.clone()
    if name == "heads":
        x[:, :, which] = source[:, :, which]
    elif name == "last":
        x[:, -1, which] = source[:, -1, which]
    else:
        x[:, which] = source[:, which]
    return x


def plain(at: Setting, name: str, points: Sequence[Point], rows: int = 1) -> np.ndarray:
    """One forward pass of the Hugging Face model for each point, of one row or several alike, with a torch hook."""
    found, call = [], at.call
    if rows > 1:
        call = {name: torch.cat([x] * rows) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    for layer, which in points:
        change = partial(overwrite, at, name, (layer, which))

        def before(module: Any, args: tuple, change: Callable = change) -> tuple:
            del module
            return (change(args[0]), *args[1:])

        def of_heads(module: Any, args: tuple, change: Callable = change) -> tuple:
            del module
            return (change(args[0].unflatten(-1, (at.heads, -1))).flatten(-2),)

        def behind(module: Any, args: tuple, out: Any, change: Callable = change) -> Any:
            del module, args
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        block = at.modules[layer]
        if name == "post":
            hook = block.register_forward_hook(behind)
        elif name == "pre":
            hook = block.register_forward_pre_hook(before)
        else:
            matrix = next(module for path, module in block.named_modules() if path.endswith("attn.o_proj"))
            hook = matrix.register_forward_pre_hook(of_heads)
        with torch.no_grad():
            logits = at.hf(**call).logits[0, -1]
        hook.remove()
        found.append(logits[7].float() - logits[9].float())
    return torch.stack(found).double().cpu().numpy()


def lens_loop(at: Setting, name: str, points: Sequence[Point]) -> np.ndarray:
    """One `run_with_hooks` of TransformerLens for each point; the mask and the picture are handed over."""
    assert at.lens is not None
    found = []
    for point in points:

        def hook(x: torch.Tensor, hook: Any, point: Point = point) -> torch.Tensor:
            del hook
            return overwrite(at, name, point, x)

        hooks = {at.lens.names[at.site(name, point[0])]: hook}
        logits = bridge.forward(at.lens.model, at.prompt, hooks, at.lens.dtype)[0, -1]
        found.append(logits[7].float() - logits[9].float())
    return torch.stack(found).double().cpu().numpy()


def ours(at: Setting, name: str, batch_size: int | None, layers: int | None = None) -> Any:
    """All points by `mv.sweep`, or those of the first layers."""

    def of_position(layer: int, position: int) -> list[mv.Edit]:
        site = at.site(name, layer)
        return [mv.patch(site, at.source[site], positions=[position])]

    def of_head(layer: int, head: int) -> list[mv.Edit]:
        site = at.site(name, layer)
        if name == "heads":
            return [mv.ablate_heads(layer, [head], to=at.source[site], cross=site.kind == "cross_z")]
        change = partial(overwrite, at, name, (layer, head))
        return [mv.Edit(site, change, "prompt", label="patch", positions=(at.length - 1,), heads=(head,))]

    axes: dict[str, Any] = {"layer": range(layers or at.layers)}
    heads = SWEEPS[name] == "z"
    axes |= {"head": range(at.heads)} if heads else {"position": at.positions}
    return mv.sweep(at.vlm, at.prompt, of_head if heads else of_position, METRIC, batch_size, **at.settings, **axes)
