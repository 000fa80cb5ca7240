"""Path patching: what two stages of hooks give by hand, exact along planted paths, and refused where no path leads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import planted_paths
import pytest
import tiny
import torch
from torch import Tensor

import mechvlm as mv

YES = mv.logit_difference("yes", "no")
PLANTED = mv.logit_difference(planted_paths.YES, planted_paths.NO)
WIDTH, HEADS = 8, 4


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return tiny.vlm(2, "sdpa", torch.float64)


@pytest.fixture(scope="module")
def real(vlm: mv.VLM) -> mv.Prompt:
    return vlm.prompt(tiny.picture(1), "is there a red cat ?")


@pytest.fixture(scope="module")
def other(vlm: mv.VLM) -> mv.Prompt:
    return vlm.prompt(tiny.picture(2), "is there a red dog ?")


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


@pytest.mark.parametrize(
    ("receivers", "mlps"),
    [
        ("logits", True),
        ("logits", False),
        (["a2.kv1<v>"], True),
        (["a2.h3<q>", "a2.kv0<k>"], False),
        (["a1.h2<q>", "a2.kv1<k>"], True),
        (["a2.h1<z>"], True),
        (["m2"], True),
    ],
)
def test_two_stages_of_hooks_give_the_same(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, receivers: Any, mlps: bool
) -> None:
    senders = ["embed", "image", "a0.h1", "a0.h3", "m0", "a1.h2", "m1"]
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
