"""Path patching: what two stages of hooks give by hand, exact along planted paths, and refused where no path leads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import planted
import planted_paths
import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments import path_effects
from mechvlm.nodes import writers

YES = mv.logit_difference("yes", "no")
PLANTED = mv.logit_difference(planted.YES, planted.NO)
WIDTH, HEADS = 8, 4


Change = Callable[[Tensor], Tensor]


class ByHand:
    """Hooks on the modules of a tiny LLaVA: before the output matrix (z), and behind MLPs and projections."""

    def __init__(self) -> None:
        self.model = tiny.model(2, "sdpa", torch.float64)
        self.layers = self.model.model.language_model.layers

    def at(self, name: str) -> Any:
        kind, layer = name[0], self.layers[int(name[1])]
        return {"m": layer.mlp, "z": layer.self_attn.o_proj}.get(kind) or layer.self_attn.get_submodule(f"{kind}_proj")

    @contextmanager
    def changed(self, name: str, change: Change) -> Iterator[None]:
        if name == "e":  # what enters the first layer
            hook = self.layers[0].register_forward_pre_hook(lambda _, given: (change(given[0].clone()), *given[1:]))
        elif name[0] == "z":
            hook = self.at(name).register_forward_pre_hook(lambda _, given: (change(given[0].clone()),))
        else:
            hook = self.at(name).register_forward_hook(lambda _module, _given, out: change(out.clone()))
        try:
            yield
        finally:
            hook.remove()

    def __call__(
        self, prompt: mv.Prompt, changes: Sequence[tuple[str, Change]] = (), read: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits of the last position with changes, and what is read after them."""
        seen: dict[str, Tensor] = {}

        def keeping(name: str) -> Change:
            def keep(x: Tensor) -> Tensor:
                seen[name] = x.clone()
                return x

            return keep

        contexts = [*changes, *((name, keeping(name)) for name in read)]
        encoding = {name: x.double() if x.is_floating_point() else x for name, x in prompt.encoding.items()}

        def run(left: Sequence[tuple[str, Change]]) -> Tensor:
            if not left:
                with torch.no_grad():
                    logits: Tensor = self.model(**encoding, use_cache=False).logits[0, -1]
                return logits
            with self.changed(*left[0]):
                return run(left[1:])

        return run(contexts), seen


def part(name: str, given: Tensor, positions: Sequence[int]) -> tuple[str, Change]:
    """What overwrites a node's part of an activation: "e", "m2", or "z1.3" (head 3 of layer 1), "q1.0" and so on."""
    node, _, head = name.partition(".")
    columns = slice(None) if not head else slice(int(head) * WIDTH, (int(head) + 1) * WIDTH)

    def overwrite(x: Tensor) -> Tensor:
        x[:, list(positions), columns] = given[:, list(positions), columns]
        return x

    return node, overwrite


def two_stages(
    hand: ByHand,
    source: mv.Prompt,
    target: mv.Prompt,
    sender: str,
    receivers: Sequence[str],
    positions: Sequence[int],
    mlps: bool = True,
) -> Tensor:
    """Logits of the target with what the receivers take in of one sender, all else frozen.

    Args:
        sender, receivers: as in `part`; without receivers the first stage's own logits.
    """
    sites = [f"{kind}{layer}" for layer in range(3) for kind in "zm"]
    _, given = hand(source, read=[*sites, "e"])
    _, own = hand(target, read=sites)
    everywhere = range(len(target))
    last = max((int(name[1]) for name in receivers), default=3)
    frozen = [part(site, own[site], everywhere) for site in sites if site[0] == "z" or mlps]
    frozen = [one for one in frozen if int(one[0][1]) < last or (one[0] == f"z{last}" and receivers[0][0] == "m")]
    patch = part(sender, given[sender.split(".", maxsplit=1)[0]], positions)
    read = [name.split(".")[0] for name in receivers]
    logits, record = hand(target, [*frozen, patch], read)
    if not receivers:
        return logits
    return hand(target, [part(name, record[name.split(".")[0]], everywhere) for name in receivers])[0]


def hand_name(name: str) -> str:
    """A node's name as the hooks above write it."""
    return {"embed": "e", "image": "e"}.get(name, name.replace(".h", ".").replace("a", "z"))


def hand_reader(name: str) -> str:
    """A reader's: "a1.kv0<v>" is "v1.0"."""
    if "<" not in name:
        return name
    of = name[-2]
    return of + name[1:-3].replace(".kv", ".").replace(".h", ".")


def value(vlm: mv.VLM, logits: Tensor) -> float:
    return float(vlm.metric(YES)(logits[None])[0])


CASES = [
    pytest.param(["a2.h3<q>", "a2.kv0<k>", "a1.kv1<v>"], True),
    *(
        pytest.param(*one, marks=zoo.second_environment)
        for one in [
            ("logits", False),
            ("logits", True),
            (["a2.h1<z>"], False),
            (["a2.kv1<v>"], True),
            (["a2.h3<q>", "a1.kv0<k>"], False),
            (["m2"], True),
        ]
    ),
]


@pytest.mark.parametrize(("receivers", "mlps"), CASES)
def test_two_stages_of_hooks_give_the_same(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, receivers: Any, mlps: bool
) -> None:
    senders = ["embed", "image", "a0.h1", "m0", "a1.h2"]
    freeze = ("heads", "mlps") if mlps else ("heads",)
    positions = [*real.image[3:9], *real.question[-3:], *real.last]
    found = mv.path_patching(vlm, real, other, YES, senders, receivers, positions, freeze)
    hand, expected = ByHand(), []
    for sender in senders:
        own = [at for at in positions if sender not in ("embed", "image") or (at in real.image) == (sender == "image")]
        reads = [] if receivers == "logits" else [hand_reader(one) for one in receivers]
        expected.append(value(vlm, two_stages(hand, real, other, hand_name(sender), reads, own, mlps)))
    assert np.abs(found.metric.values - expected).max() < 1e-9
    assert np.abs(found.metric.values - found.attrs["target_metric"]).max() > 1e-3


def carried(path: Any, senders: Any, receivers: Any, **settings: Any) -> dict[str, float]:
    """The share that each sender carries, where it is any at all."""
    found = mv.path_patching(path.vlm, path.source, path.target, PLANTED, senders, receivers, **settings).normalised
    return {name: round(share, 12) for name, share in found.to_series().items() if abs(share) > 0}


def test_of_two_hops_each_edge_carries_all_and_no_other_anything() -> None:
    path = planted_paths.two_hops()
    receivers = {
        "first": ["a0.kv0<v>"],
        "hop": ["a2.kv1<v>"],
        "others": ["a0.h1<q>", "a2.kv0<v>", "a2.kv1<k>", "a2.h2<q>", "m3"],
        "out": "logits",
    }
    assert carried(path, writers(path.vlm.shape), receivers) == {
        ("first", "image"): 1.0,
        ("hop", "a0.h1"): 1.0,
        ("out", "a2.h2"): 1.0,
    }


@zoo.second_environment
def test_a_path_is_where_its_sender_is_patched_and_the_same_in_both_directions() -> None:
    path = planted_paths.two_hops()
    assert carried(path, ["a0.h1"], ["a2.h2<z>"], positions="question") == {"a0.h1": 1.0}
    assert carried(path, ["a0.h1"], ["a2.h2<z>"], positions="image") == {}
    assert carried(path, ["a0.h1", "image"], ["a2.kv1<v>"], direction="noise", freeze=("heads",)) == {"a0.h1": 1.0}


@zoo.second_environment
def test_heads_that_share_keys_and_values_are_one_receiver_and_two_senders() -> None:
    path = planted_paths.twins()
    assert carried(path, ["image"], ["a1.kv1<v>"]) == {"image": 1.0}
    assert carried(path, ["image"], {"two": ["a1.h2<z>"], "three": ["a1.h3<z>"]}) == {
        ("two", "image"): round(2 / 3, 12),
        ("three", "image"): round(1 / 3, 12),
    }
    direct = carried(path, None, "logits")
    assert direct == {"a1.h2": round(2 / 3, 12), "a1.h3": round(1 / 3, 12)}
    assert sum(direct.values()) == pytest.approx(1.0, abs=1e-11)


def test_a_direct_path_is_what_the_head_writes_added_to_the_last_stream(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt
) -> None:
    z, end = mv.Site("z", 1), mv.Site("resid_post", 2)
    source, target = (vlm.run(prompt, [z, end]) for prompt in (real, other))
    added = (source[z] - target[z])[0, -1, 2] @ vlm.weights.W_O(1, 2)
    logits = vlm.unembed((target[end][0, -1] + added)[None])
    found = mv.path_patching(vlm, real, other, YES, ["a1.h2"])
    assert float(found.metric[0]) == pytest.approx(float(vlm.metric(YES)(logits)[0]), abs=1e-9)


@zoo.second_environment
def test_of_one_prompt_into_itself_nothing_is_carried(vlm: mv.VLM, real: mv.Prompt) -> None:
    found = mv.path_patching(vlm, real, real, YES, ["image", "a0.h1", "m1"], ["a2.kv0<v>", "m2"])
    assert np.abs(found.metric.values - found.attrs["source_metric"]).max() < 1e-9
    assert "nothing to carry over" in found.attrs["note"]


@zoo.second_environment
def test_finished_senders_are_read_from_the_folder_and_another_experiment_refused(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_effects, "AT_ONCE", 1)  # each sender is a piece

    def patched(**more: Any) -> Any:
        receivers = {"v": ["a2.kv0<v>"], "late": ["a1.h0<q>"]}
        return mv.path_patching(vlm, real, other, YES, ["a0.h1", "a1.h2"], receivers, **more)

    first = patched(out=tmp_path)
    again = patched(out=tmp_path)
    plain = patched()
    assert again.attrs["engine"] == f"read from {tmp_path.name}" != first.attrs["engine"]
    assert np.array_equal(first.metric, again.metric, equal_nan=True)
    assert np.allclose(first.metric, plain.metric, atol=1e-12, equal_nan=True)
    assert np.isnan(first.metric.sel(receiver="late", sender="a1.h2"))
    with pytest.raises(ValueError, match="holds another sweep"):
        patched(positions="last", out=tmp_path)


@zoo.second_environment
def test_the_figure_has_a_row_a_layer_and_one_for_what_enters(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> None:
    found = mv.path_patching(vlm, real, other, YES, ["embed", "a0.h1", "m1"]).normalised
    figure: Any = mv.plot.senders(found)
    assert list(figure.layout.yaxis.ticktext) == ["in", "0", "1"]
    assert list(figure.layout.xaxis.ticktext) == ["h1", "MLP", "words"]
    drawn = np.array(figure.data[0].z, dtype=float)
    assert (drawn[0, 2], drawn[1, 0], drawn[2, 1]) == tuple(found.values)
    assert np.isnan(drawn).sum() == 6
