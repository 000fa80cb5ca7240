"""Path patching and back-patching on every architecture, beside runs made by hand with plain patches, one by one."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import zoo
from test_experiments_zoo import VARIANTS, made

import mechvlm as mv

pytestmark = zoo.second_environment
METRIC = mv.logit_difference(30, 31)
every = pytest.mark.parametrize("name", VARIANTS)


@cache
def parts(name: str) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    if zoo.there(name):
        pytest.skip(zoo.there(name))
    return made(name)


def near(found: Any, expected: Any) -> None:
    """The same, to within the rounding of float32."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 3e-5 * max(1.0, float(np.abs(expected).max()))


def value(vlm: mv.VLM, run: mv.Run) -> float:
    return float(vlm.metric(METRIC)(run.logits.float())[0])


def z_of(vlm: mv.VLM, layer: int) -> mv.Site:
    kinds = vlm.shape.kinds["text"][layer]
    return mv.Site("z" if "z" in kinds else "cross_z", layer)


def head_patch(site: mv.Site, given: Any, heads: Sequence[int], positions: Sequence[int]) -> mv.Edit:
    def overwrite(x: Any) -> Any:
        for position in positions:
            x[:, position, list(heads)] = given[:, position, list(heads)]
        return x

    return mv.Edit(site, overwrite, "prompt")


def patch_of(vlm: mv.VLM, sender: str, given: mv.Run, prompt: mv.Prompt, at: Sequence[int]) -> list[mv.Edit]:
    if sender in ("embed", "image"):
        site = mv.Site("resid_pre", 0)
        return [mv.patch(site, given[site], [one for one in at if (one in prompt.image) == (sender == "image")])]
    layer = int(sender[1])
    if sender[0] == "d":
        site = mv.Site("deepstack", layer)
        return [mv.Edit(site, lambda x: given[site].reshape(x.shape))]
    if sender[0] == "m":
        return [mv.patch(mv.Site("mlp_out", layer), given[mv.Site("mlp_out", layer)], at)]
    return [head_patch(z_of(vlm, layer), given[z_of(vlm, layer)], [int(sender[4:])], at)]


@cache
def both(name: str) -> tuple[mv.Run, mv.Run]:
    """What the two prompts show where senders write."""
    vlm, real, null = parts(name)
    layers = range(vlm.shape.layers["text"])
    sites = [mv.Site("resid_pre", 0), *(z_of(vlm, layer) for layer in layers)]
    sites += [mv.Site("mlp_out", layer) for layer in layers]
    sites += [mv.Site("deepstack", layer) for layer in range(vlm.shape.deepstack)]
    return vlm.run(real, sites), vlm.run(null, sites)


def stages(name: str, sender: str, receivers: Sequence[str], at: Sequence[int], free: bool) -> float:
    """The metric by two runs, of which the first holds all heads, and MLPs, before the receivers' layer."""
    vlm, _, null = parts(name)
    given, own = both(name)
    layers = vlm.shape.layers["text"]
    last = layers if receivers == ["logits"] else int(receivers[0][1])
    frozen = [mv.patch(z_of(vlm, layer), own[z_of(vlm, layer)]) for layer in range(last + (receivers[0][0] == "m"))]
    if not free:
        frozen += [mv.patch(mv.Site("mlp_out", at), own[mv.Site("mlp_out", at)]) for at in range(last)]
    edits = [*frozen, *patch_of(vlm, sender, given, null, at)]
    if receivers == ["logits"]:
        return value(vlm, vlm.run(null, edits=edits))
    kinds = {one: one[one.index("<") + 1] if "<" in one else "mlp_out" for one in receivers}
    across = "z" not in vlm.shape.kinds["text"][last]
    reads = {
        one: z_of(vlm, last) if kind == "z" or across and kind == "q" else mv.Site(kind, last)
        for one, kind in kinds.items()
    }
    record = vlm.run(null, list(reads.values()), edits)
    back = []
    for one, site in reads.items():
        if site.kind == "mlp_out":
            back.append(mv.patch(site, record[site]))
        else:
            number = one[one.index(".") + 1 : one.index("<")].strip("hkv") if "." in one else ""
            heads = [int(number)] if number else range(vlm.shape.heads["text"])
            back.append(head_patch(site, record[site], heads, range(len(null))))
    return value(vlm, vlm.run(null, edits=back))


@every
def test_a_path_is_two_runs_by_hand(name: str) -> None:
    vlm, real, null = parts(name)
    end = vlm.shape.layers["text"] - 1
    crossed = "q" not in vlm.shape.kinds["text"][end]
    attention = [f"a{end}<q>"] if crossed else [f"a{end}.h1<q>", f"a{end}.kv0<k>", f"a{end}.kv0<v>"]
    sets = {"qkv": attention, "mlp": [f"m{end}"], "out": ["logits"]}
    senders = ["image", f"a{end - 1}.h0", *(["d0"] if vlm.shape.deepstack else [])]
    at = [*null.image, *null.question[-2:], *null.last]
    found = mv.path_patching(vlm, real, null, METRIC, senders, sets, at)
    near(found.metric, [[stages(name, one, names, at, False) for one in senders] for names in sets.values()])
    assert np.abs(found.metric - found.attrs["target_metric"]).max() > 1e-3
    free = mv.path_patching(vlm, real, null, METRIC, ["m0"], [f"a{end}.h1<z>"], freeze=("heads",))
    near(free.metric, [stages(name, "m0", [f"a{end}.h1<z>"], range(len(null)), True)])


@every
def test_heads_of_the_last_layer_pass_on_all_directly_and_by_its_mlp(name: str) -> None:
    vlm, real, null = parts(name)
    end = vlm.shape.layers["text"] - 1
    heads = [f"a{end}.h{head}" for head in range(vlm.shape.heads["text"])]
    found = mv.path_patching(vlm, real, null, METRIC, heads, freeze=("heads",))
    kind = z_of(vlm, end).kind
    near(found.metric, mv.patch_heads(vlm, real, null, METRIC, kind=kind, layers=[end]).metric.values[0])


@every
def test_a_later_layers_image_tokens_are_a_patch_of_an_earlier_one(name: str) -> None:
    vlm, real, _ = parts(name)
    end = vlm.shape.layers["text"] - 1
    found = mv.back_patching(vlm, real, METRIC, sources=[end], destinations=[0], control=None)
    of, to = (mv.Site("resid_post", layer) for layer in (end, 0))
    streams = vlm.run(real, [of])[of]
    near(found.metric.item(), value(vlm, vlm.run(real, edits=[mv.patch(to, streams, real.image)])))
    assert ("added_again" in found.attrs) == (vlm.shape.deepstack > 0)
