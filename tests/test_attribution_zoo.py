"""Attribution patching on every architecture, by hooks on the model's own layers; long, so in the second environment.

A layer that adds nothing to what flows back hands its gradient on as it is: in a pass that leaves a layer out, what
leaves it is what enters it plus a constant. And the pattern that a patch of queries or keys makes is what the model's
own eager attention makes of it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor
from zoo.boxes import noise

import mechvlm as mv
from mechvlm.references import layer_at, own_gradients, own_patterns, placed

pytestmark = zoo.second_environment
METRIC = mv.logit_difference(30, 31)
STEPS = 3
every = pytest.mark.parametrize("case", zoo.VARIANTS)


@cache
def made(case: str) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    if zoo.there(case):
        pytest.skip(zoo.there(case))
    vlm = zoo.build(case, "eager" if case in zoo.EAGER_ONLY else "sdpa")
    real, null = (zoo.ask(vlm, noise(seed)) for seed in (0, 1))
    return vlm, real, null


def near(found: Any, expected: Any, most: float = 1e-3) -> None:
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < most * np.abs(expected).max()


Hook = Callable[[Any, tuple, dict, Any], Any]


@contextmanager
def hooked(vlm: mv.VLM, tower: str, hook: Callable[[int], Hook]) -> Iterator[None]:
    """While each layer of a tower has a hook."""
    with ExitStack() as stack:
        for index in range(vlm.shape.live[tower]):
            layer = layer_at(vlm, tower, index)
            stack.callback(layer.register_forward_hook(hook(index), with_kwargs=True, prepend=True).remove)
        yield


def ran(
    vlm: mv.VLM, prompt: mv.Prompt, tower: str, dropped: int | None = None, start: Callable | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """What leaves each layer of a tower, and its gradient; with one layer left out of the way back.

    Args:
        start: from what the language model is called with to what it is called with instead.
    """
    left: dict[int, Tensor] = {}

    def of(index: int) -> Hook:
        def leave(_: Any, given: tuple, named: dict, out: Any) -> Any:
            whole = out[0] if isinstance(out, tuple) else out
            entered = given[0] if given else named["hidden_states"]
            if not whole.requires_grad:
                whole = whole.detach().requires_grad_(True)
            elif index == dropped:
                whole = entered + (whole - entered).detach()
            left[index] = whole
            return (whole, *out[1:]) if isinstance(out, tuple) else whole

        return leave

    first = attribute(vlm, str(vlm.arch.text.embed))
    body = attribute(vlm, str(vlm.arch.text.embed).rpartition(".")[0])
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(hooked(vlm, tower, of))
        if tower == "text":
            stack.callback(first.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_(True)).remove)
        if start is not None:
            change: Any = lambda _m, given, named: (given, start(named))  # noqa: E731
            stack.callback(body.register_forward_pre_hook(change, with_kwargs=True).remove)
        logits = vlm.hf(**placed(vlm, prompt), use_cache=False).logits[0, -1]
        held = [left[index] for index in sorted(left)]
        found = torch.autograd.grad(logits[30] - logits[31], held, allow_unused=True)
    given = [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(held, found, strict=True)]
    return [x.detach() for x in held], given


def attribute(vlm: mv.VLM, path: str) -> Any:
    found = vlm.hf
    for name in path.split("."):
        found = found.get_submodule(name)
    return found


def by_position(products: list[Tensor]) -> np.ndarray:
    """Sums over the last axis, and over all tiles."""
    return np.stack([x.double().sum(-1).reshape(-1, x.shape[-2]).sum(0).numpy() for x in products])


def here(vlm: mv.VLM, prompt: mv.Prompt, tower: str) -> list[int]:
    """The positions at which no feature is added behind the layer."""
    if tower == "text" and vlm.shape.deepstack:
        return [at for at in range(len(prompt)) if at not in prompt.image]
    return []


def estimates(vlm: mv.VLM, source: mv.Prompt, target: mv.Prompt, tower: str, **how: Any) -> np.ndarray:
    found = mv.attribution_patching(vlm, source, target, METRIC, ["resid_post"], tower=tower, **how).resid_post.values
    some = here(vlm, target, tower)
    return found[:, some] if some else found


@every
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_what_leaves_layers_is_estimated_as_by_hooks(case: str, tower: str) -> None:
    vlm, real, null = made(case)
    some = here(vlm, null, tower) or slice(None)
    given, _ = ran(vlm, real, tower)
    own, gradient = ran(vlm, null, tower)
    expected = by_position([(a - b) * g for a, b, g in zip(given, own, gradient, strict=True)])[:, some]
    near(estimates(vlm, real, null, tower), expected)
    assert np.abs(expected).max() > 1e-6
    sizes = []
    for index in range(vlm.shape.live[tower]):
        _, gradient = ran(vlm, null, tower, index)
        sizes.append(np.abs(by_position([(a - b) * g for a, b, g in zip(given, own, gradient, strict=True)])[:, some]))
    near(estimates(vlm, real, null, tower, method="drop"), np.mean(sizes, 0))


@every
def test_a_path_of_embeddings_is_a_loop_over_what_the_language_model_is_called_with(case: str) -> None:
    vlm, real, null = made(case)
    names = ("inputs_embeds", "deepstack_visual_embeds", "cross_attention_states")
    ends: list[dict[str, Any]] = []

    def keep(named: dict) -> dict:
        ends.append({name: named[name] for name in names if named.get(name) is not None})
        return named

    given, _ = ran(vlm, real, "text", start=keep)
    own, _ = ran(vlm, null, "text", start=keep)
    total: list[Tensor] = [torch.zeros(())] * len(own)
    for step in range(STEPS):
        share = (step + 0.5) / STEPS

        def move(named: dict, share: float = share) -> dict:
            new = dict(named)
            for name in ends[0]:
                pairs = zip(*(x[name] if isinstance(x[name], list) else [x[name]] for x in ends), strict=True)
                moved = [(b + share * (a - b)).detach().requires_grad_(True) for a, b in pairs]
                new[name] = moved if isinstance(named[name], list) else moved[0]
            return new

        _, gradient = ran(vlm, null, "text", start=move)
        total = [x + g / STEPS for x, g in zip(total, gradient, strict=True)]
    expected = by_position([(a - b) * g for a, b, g in zip(given, own, total, strict=True)])
    near(
        estimates(vlm, real, null, "text", method="ig", steps=STEPS),
        expected[:, here(vlm, null, "text") or slice(None)],
    )


@every
def test_queries_and_keys_make_the_pattern_that_the_model_makes_of_them(case: str) -> None:
    vlm, real, null = made(case)
    layer = max(at for at, kinds in enumerate(vlm.shape.kinds["text"]) if "q" in kinds)
    every = mv.attribution_patching(vlm, real, null, METRIC, ["q", "k"], method="qk", layers=[layer])
    yes, no = (own_gradients(vlm, null, token) for token in (30, 31))
    site, sites = mv.Site("pattern", layer), {kind: mv.Site(kind, layer) for kind in ("q", "k")}
    before, of_pattern = own_patterns(vlm, null)[site].double(), (yes[site] - no[site]).double()
    run = vlm.run(real, list(sites.values()))
    kernel, vlm.attention = vlm.attention, "eager"
    try:
        for kind, where in sites.items():
            found, source = every[kind].sel(layer=layer), run[where]
            for position, head in ((null.image[0], 0), (len(null) - 1, source.shape[2] - 1)):
                put: Any = lambda x, of=source, at=position, head=head: put_in(x, of, at, head)  # noqa: E731
                anew = vlm.run(null, [site], [mv.Edit(where, put)])[site].double()
                estimate, most = float(found.sel(position=position)[head]), float(np.abs(found).max())
                assert estimate == pytest.approx(float(((anew - before) * of_pattern).sum()), rel=1e-3, abs=1e-3 * most)
    finally:
        vlm.attention = kernel


def put_in(x: Tensor, source: Tensor, position: int, head: int) -> Tensor:
    x[:, position, head] = source[:, position, head]
    return x


@pytest.mark.parametrize("case", ["llava_next-mistral", "qwen2_5_vl", "llava-pixtral", "mllama", "instructblip"])
def test_towers_of_pictures_are_rescored_tile_by_tile(case: str) -> None:
    vlm, real, null = made(case)
    tower = "qformer" if "qformer" in vlm.shape.layers else "vision"
    found = mv.attribution_patching(vlm, real, null, METRIC, ["q", "k"], method="qk", layers=[1], tower=tower)
    site, sites = mv.Site("pattern", 1, tower), {kind: mv.Site(kind, 1, tower) for kind in ("q", "k")}
    source, run = vlm.run(real, list(sites.values())), vlm.run(null, [site], grad_of=METRIC)
    for kind, where in sites.items():
        for position in (0, found.sizes["position"] - 1):
            put: Any = lambda x, at=position, given=source[where]: put_in(x, given, at, 0)  # noqa: E731
            change = vlm.run(null, [site], [mv.Edit(where, put)])[site] - run[site]
            expected = float((change.double() * run.grad[site].double()).sum())
            estimate = float(found[kind].sel(layer=1, position=position)[0])
            assert estimate == pytest.approx(expected, rel=1e-3, abs=1e-3 * float(np.abs(found[kind]).max()))
