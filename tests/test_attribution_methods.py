"""The ways of attribution patching: each by plain autograd on the eager model, and right where the gradient is not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import planted
import planted_attention
import pytest
import tiny
import torch
import xarray as xr
import zoo
from plain import Place, Plain
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments.rescored import key_changes, query_changes
from mechvlm.lazy_attention import Attention
from mechvlm.masks import Sees

YES = mv.logit_difference("yes", "no")
PLANTED = mv.logit_difference(planted.YES, planted.NO)
KINDS = ("resid_pre", "k", "z", "attn_out", "mlp_out", "resid_post")
LAYERS = range(3)


def watched(vlm: mv.VLM, prompt: mv.Prompt, edits: Any = ()) -> tuple[Plain, Tensor]:
    """A plain pass of the eager model in a graph, and the metric."""
    plain = Plain(tiny.model(2, "eager", torch.float64), edits, gradients=True)
    encoding = {name: x.double() if x.is_floating_point() else x for name, x in prompt.encoding.items()}
    logits = plain(encoding)[0, -1]
    return plain, logits[vlm.token_ids("yes")].logsumexp(0) - logits[vlm.token_ids("no")].logsumexp(0)


def by_hand(
    vlm: mv.VLM, source: mv.Prompt, target: mv.Prompt, passes: list, of: Callable[[Tensor], Tensor], tower: str = "text"
) -> dict[str, Tensor]:
    """(source - target) times each pass's gradient, by position and head; what `of` makes of it, summed over passes."""
    places: dict[str, list[Place]] = {kind: [(kind, layer, tower) for layer in LAYERS] for kind in KINDS}
    with torch.no_grad():
        runs = [watched(vlm, prompt)[0].seen for prompt in (source, target)]
    found = {kind: torch.zeros(()) for kind in KINDS}
    for edits in passes:
        plain, value = watched(vlm, target, edits)
        for kind, held in places.items():
            products = [((runs[0][at] - runs[1][at]) * plain.gradient(value, at)).sum(-1)[0] for at in held]
            found[kind] = found[kind] + of(torch.stack(products).detach())
    return found


def same(found: Any, expected: Any, most: float = 1e-9) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < most
    assert np.abs(expected).max() > 1e-3


# -- queries and keys --------------------------------------------------------------------------------------------------

SIGHTS = {
    "causal": Sees(7, 7, causal=True),
    "everything": Sees(7, 7),
    "window": Sees(7, 7, causal=True, window=2),
    "stretches": Sees(7, 7, stretch=torch.tensor([0, 0, 1, 1, 1, 2, 2])),
}
MORE = [
    ("causal", 3.0),
    ("window", None),
    *((sight, cap) for sight in ("everything", "stretches") for cap in (None, 3.0)),
]


@pytest.mark.parametrize(
    ("sight", "cap"),
    [("causal", None), ("window", 3.0), *(pytest.param(*one, marks=zoo.second_environment) for one in MORE)],
)
def test_the_softmax_made_anew_is_the_softmax_made_anew(sight: str, cap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    q, q2 = (3 * torch.randn(2, 4, 7, 6, **draw) for _ in range(2))
    k, k2, v = (3 * torch.randn(2, 2, 7, 6, **draw) for _ in range(3))
    of_z = torch.randn(2, 7, 4, 6, **draw)
    # Of 2,000 bytes a piece is a few rows of one key-value head.
    attention = Attention(q, k, v, SIGHTS[sight], 0.5, cap, 2000, z_gradient=of_z)
    of_pattern = torch.einsum("bqhd,bhkd->bhqk", of_z, v.repeat_interleave(2, 1))

    def pattern(q: Tensor, k: Tensor) -> Tensor:
        made = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.5
        made = made if cap is None else torch.tanh(made / cap) * cap
        return (made + SIGHTS[sight].whole(q)).softmax(-1)

    def patched(keys: list[int], head: int) -> Tensor:
        new = k.clone()
        new[:, head, keys] = k2[:, head, keys]
        return ((pattern(q, new) - pattern(q, k)) * of_pattern).sum((1, 2, 3))

    same(query_changes(attention, q2), ((pattern(q2, k) - pattern(q, k)) * of_pattern).sum(-1), 1e-12)
    each = torch.stack([torch.stack([patched([at], head) for at in range(7)], -1) for head in range(2)], 1)
    same(key_changes(attention, k2), each, 1e-12)
    some = [[0], [1, 3, 6]]
    joint = torch.stack([torch.stack([patched(held, head) for held in some], -1) for head in range(2)], 1)
    same(key_changes(attention, k2, some), joint, 1e-12)


def test_a_key_that_has_all_the_attention_but_for_rounding_gives_it_up() -> None:
    q, v = torch.ones(1, 1, 1, 1), torch.tensor([[[[1.0], [2.0], [4.0]]]])
    k, new = (torch.tensor([[[[first], [0.0], [0.0]]]]) for first in (60.0, -60.0))
    attention = Attention(q, k, v, Sees(1, 3), 1.0, z_gradient=torch.ones(1, 1, 1, 1))
    # All of the first key's weight goes to the two others alike.
    assert float(key_changes(attention, new)[0, 0, 0]) == pytest.approx((2 + 4) / 2 - 1)
    back = Attention(q, new, v, Sees(1, 3), 1.0, z_gradient=torch.ones(1, 1, 1, 1))
    assert float(key_changes(back, k)[0, 0, 0]) == pytest.approx(1 - (2 + 4) / 2)


@pytest.fixture(scope="module")
def rescored(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> xr.Dataset:
    return mv.attribution_patching(vlm, real, other, YES, kinds=["q", "k", "z"], method="qk")


def test_queries_and_keys_are_put_into_the_eager_models_softmax(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, rescored: xr.Dataset
) -> None:
    own, value = watched(vlm, other)
    source, _ = watched(vlm, real)
    for kind, heads, served in (("q", 4, 1), ("k", 2, 2)):
        for layer, place, head in ((0, 5, 1), (2, len(other) - 1, 0)):
            site, there = (kind, layer, "text"), ("pattern", layer, "text")

            def put(x: Tensor, at: Place = site, place: int = place, head: int = head) -> Tensor:
                x[:, place, head] = source.seen[at][:, place, head]
                return x

            with torch.no_grad():
                patched, _ = watched(vlm, other, [(site, put, "value")])
            change = ((patched.seen[there] - own.seen[there]) * own.gradient(value, there)).detach()
            assert rescored[kind].shape == (3, len(other), heads)
            estimate = float(rescored[kind].sel(layer=layer, position=place)[head])
            assert estimate == pytest.approx(float(change.sum()), abs=1e-10)
            touched = change.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
            assert touched == list(range(head * served, (head + 1) * served))


def test_other_kinds_are_as_without_it(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, rescored: xr.Dataset) -> None:
    assert (rescored.z == mv.attribution_patching(vlm, real, other, YES, kinds=["z"]).z).all()


def test_saturated_queries_and_keys_are_found() -> None:
    vlm, plain, unasked, marked = planted_attention.saturated()
    for kind, source, place, head in (("q", unasked, len(plain) - 1, 2), ("k", marked, planted_attention.PLACE, 1)):
        asked = (vlm, source, plain, PLANTED, [kind], "each", [1])
        found = mv.attribution_patching(*asked, method="qk", verify=3)
        own = found[kind].sel(layer=1)
        assert np.unravel_index(int(np.abs(own.values).argmax()), own.shape) == (place, head)
        exact = float(np.abs(found.exact).max())
        assert exact > 1
        assert np.abs(found.estimate - found.exact).max() < 1e-4 * exact  # all that follows is linear
        assert np.abs(mv.attribution_patching(*asked)[kind]).max() < 1e-3 * exact
        # Of three layers the second is the head's own, and the others are not on the way to the answer.
        starred = mv.attribution_patching(*asked, method="atp*")[kind].sel(layer=1)
        assert np.abs(starred - np.abs(own)).max() < 1e-4 * exact


# -- layers left out ---------------------------------------------------------------------------------------------------


def test_gradients_without_a_layer_are_plain_autograds(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> None:
    drops = [[((kind, at, "text"), torch.zeros_like, "grad") for kind in ("attn_out", "mlp_out")] for at in LAYERS]
    expected = by_hand(vlm, real, other, drops, torch.abs)
    found = mv.attribution_patching(vlm, real, other, YES, kinds=KINDS, method="drop", batch_size=2)
    for kind in KINDS:
        same(found[kind], expected[kind] / (3 if kind.startswith("resid") else 2))
    assert found.attrs["passes"] == 3


@zoo.second_environment
def test_layers_before_the_first_one_asked_for_are_one_pass(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> None:
    whole = mv.attribution_patching(vlm, real, other, YES, kinds=["z", "q"], method="atp*")
    some = mv.attribution_patching(vlm, real, other, YES, kinds=["z", "q"], method="atp*", layers=[2])
    assert some.attrs["passes"] == 2
    for kind in ("z", "q"):
        same(some[kind].sel(layer=2), whole[kind].sel(layer=2), 1e-12)


def test_effects_that_cancel_are_found(vlm: mv.VLM) -> None:
    vlm, dark, bright = planted_attention.cancelled()
    asked: dict[str, Any] = {"kinds": ["z"], "layers": [1], "verify": 5}
    found = {
        method: mv.attribution_patching(vlm, dark, bright, PLANTED, **asked, method=method)
        for method in ("atp", "drop")
    }
    node = {"layer": 1, "position": len(bright) - 1, "head": 2}
    of = found["drop"].isel(kind=0)
    exact = float(np.abs(of.exact).max())
    assert exact > 1 and int(of.node_position[int(np.abs(of.exact.values).argmax())]) == node["position"]
    assert abs(float(found["atp"].z.sel(node))) < 1e-3 * exact
    rest = found["drop"].z.copy()
    rest.loc[node] = 0.0
    assert float(found["drop"].z.sel(node)) > 0.5 * exact and float(rest.max()) < 1e-3 * exact
    assert float(of.precision) == 1.0


# -- paths -------------------------------------------------------------------------------------------------------------

SHARES = {"midpoint": (0.25, 0.75), "left": (0.0, 0.5), "right": (0.5, 1.0)}


@pytest.mark.parametrize(
    "rule", ["midpoint", *(pytest.param(rule, marks=zoo.second_environment) for rule in ("left", "right"))]
)
def test_gradients_along_the_embeddings_are_a_loops(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, rule: str) -> None:
    entering: Place = ("resid_pre", 0, "text")
    with torch.no_grad():
        ends = [watched(vlm, prompt)[0].seen[entering] for prompt in (other, real)]

    def moved(share: float) -> Callable[[Tensor], Tensor]:
        return lambda _: (1 - share) * ends[0] + share * ends[1]

    expected = by_hand(
        vlm, real, other, [[(entering, moved(share), "value")] for share in SHARES[rule]], lambda x: x / 2
    )
    found = mv.attribution_patching(vlm, real, other, YES, kinds=KINDS, method="ig", steps=2, rule=rule, batch_size=1)
    for kind in KINDS:
        same(found[kind], expected[kind])
    gap = abs(float(found.resid_pre.sel(layer=0).sum()) - found.attrs["source_metric"] + found.attrs["target_metric"])
    assert found.attrs["completeness_gap"] == pytest.approx(gap, abs=1e-10)


@pytest.mark.parametrize(
    "path", ["embed", *(pytest.param(path, marks=zoo.second_environment) for path in ("image_features", "pixels"))]
)
def test_estimates_at_the_inputs_sum_to_the_difference(vlm: mv.VLM, real: mv.Prompt, path: str) -> None:
    null = real.with_image(mv.images.black)
    kinds = ["image_features", "embed", "resid_pre"]
    found = mv.attribution_patching(
        vlm, real, null, YES, kinds, method="ig", steps=60, rule="gauss-legendre", path=path, layers=[0]
    )
    gap = found.attrs["source_metric"] - found.attrs["target_metric"]
    assert abs(gap) > 0.1 and found.attrs["completeness_gap_relative"] < 1e-3
    if path != "pixels":  # behind the vision tower the way is no straight line
        for kind in ("image_features", "resid_pre"):
            assert float(found[kind].sum()) == pytest.approx(gap, rel=1e-3)


# -- where -------------------------------------------------------------------------------------------------------------


@zoo.second_environment
def test_positions_by_name_are_one_patch_and_keys_share_a_softmax(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt
) -> None:
    places = {"two": [3, 5], "end": [-1], "image": real.image}
    asked: dict[str, Any] = {"kinds": ["resid_pre", "z", "q", "k"], "layers": [1]}
    each = mv.attribution_patching(vlm, real, other, YES, **asked, method="qk")
    named = mv.attribution_patching(vlm, real, other, YES, **asked, method="qk", positions=places, verify=2)
    for kind in ("resid_pre", "z", "q"):
        same(named[kind].sel(span="two"), each[kind].sel(position=[3, 5]).sum("position"), 1e-12)
    same(named.k.sel(span="end"), each.k.isel(position=-1), 1e-12)
    run = vlm.run(other, {"text.1.pattern": mv.lazy()}, grad_of=YES)
    k = vlm.run(real, ["text.1.k"])["text.1.k"].transpose(1, 2)
    same(named.k.sel(span="two", layer=1), key_changes(run.grad["text.1.pattern"], k, [[3, 5]])[0, :, 0], 1e-12)
    exact = mv.patch_heads(vlm, real, other, YES, real.image, "k", layers=[1])
    node = named.sel(kind="k").isel(node=int(np.flatnonzero(named.node_span.sel(kind="k") == "image")[0]))
    change = exact.metric.sel(layer=1, kv_head=int(node.node_head)) - exact.attrs["target_metric"]
    assert float(node.exact) == pytest.approx(float(change), abs=1e-12)


@zoo.second_environment
def test_regions_of_the_picture_sum_its_tokens(vlm: mv.VLM, real: mv.Prompt) -> None:
    null = real.with_image(mv.images.black)
    regions = mv.image_regions(null, 2, 2)
    found = mv.attribution_patching(
        vlm, real, null, YES, ["image_features"], lambda prompt: mv.image_regions(prompt, 2, 2)
    )
    each = mv.attribution_patching(vlm, real, null, YES, ["image_features"])
    assert found.image_features.dims == ("span",) and each.image_features.dims == ("position",)
    for name, held in regions.items():
        assert float(found.image_features.sel(span=name)) == pytest.approx(
            float(each.image_features.sel(position=held).sum())
        )
    assert np.isnan(each.image_features.sel(position=null.question)).all()


@pytest.mark.parametrize("method", ["atp", pytest.param("drop", marks=zoo.second_environment)])
def test_the_vision_tower_is_estimated_by_its_own_positions(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, method: str
) -> None:
    passes: list = [[]]
    if method == "drop":
        drop = ("attn_out", "mlp_out")
        passes = [[((kind, at, "vision"), torch.zeros_like, "grad") for kind in drop] for at in range(2)]
    expected = by_hand(vlm, real, other, passes, torch.abs if method == "drop" else lambda x: x, "vision")
    found = mv.attribution_patching(vlm, real, other, YES, kinds=KINDS, tower="vision", method=method, verify=1)
    for kind in KINDS:
        passed = 2 if method == "drop" and kind.startswith("resid") else 1
        same(found[kind], expected[kind][:2] / passed)
    node = found.sel(kind="mlp_out").isel(node=0)
    place: dict[str, Any] = {"positions": [int(node.node_position)], "kind": "mlp_out", "tower": "vision"}
    exact = mv.patch_positions(vlm, real, other, YES, **place).sel(layer=int(node.node_layer))
    assert float(node.exact) == pytest.approx(exact.metric.item() - exact.attrs["target_metric"], abs=1e-12)


@zoo.second_environment
def test_two_pictures_are_moved_position_by_position(vlm: mv.VLM) -> None:
    one, two = (vlm.prompt([tiny.picture(3), tiny.picture(at)], "is there a red cat ?") for at in (1, 2))
    found = mv.attribution_patching(vlm, one, two, YES, kinds=["mlp_out"], tower="vision", layers=[1])
    sums = {}
    for at in (0, 1):
        held = vlm.run([one, two], ["vision.1.mlp_out"]).rows
        source, target = (row["vision.1.mlp_out"][at] for row in held)
        gradient = vlm.run(two, ["vision.1.mlp_out"], grad_of=YES).grad["vision.1.mlp_out"][at]
        sums[at] = ((source - target) * gradient).sum(-1)
    assert not sums[0].any()  # the same picture
    same(found.mlp_out.sel(layer=1), sums[1])


# -- beside the exact answer -------------------------------------------------------------------------------------------


def test_estimates_without_sign_are_held_against_sizes(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> None:
    found = mv.attribution_patching(vlm, real, other, YES, kinds=["mlp_out"], method="drop", verify=4, layers=[1])
    of = found.sel(kind="mlp_out")
    assert (of.estimate >= 0).all() and (of.exact < 0).any() and found.attrs["signed"] == 0
    size = np.abs(of.exact.values)
    assert float(of.missed) == np.abs(size - of.estimate.values)[4:].max()
    assert float(of.pearson.sel(among="both")) == pytest.approx(np.corrcoef(of.estimate, size)[0, 1])
    figure: Any = mv.plot.attributed(found)
    assert list(figure.data[2].y) == size[4:].tolist()
    assert figure.layout.yaxis.title.text == "|exact| (logits)"
