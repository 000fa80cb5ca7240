"""On every architecture: what readers take adds up to the stream's gradient, and a score is its patch's slope."""

import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments.edge_patches import edge_edits, restored_sites
from mechvlm.nodes import Node, readers
from mechvlm.passes import of_groups, pass_of, passed
from mechvlm.reads import attention_gradients, inputs_of, mlp_gradient, raw_sites, stream_sites
from mechvlm.visit import Visit
from mechvlm.writes import write_sites, writing, written

pytestmark = zoo.second_environment
STEPS = (0.01, 0.005, -0.005, -0.01)  # norms are in single precision, so no smaller
every_architecture = pytest.mark.parametrize("name", zoo.VARIANTS)


def metric(logits: Tensor) -> Tensor:
    return logits[:, 30] - logits[:, 31]


def asked(name: str) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    if zoo.there(name):
        pytest.skip(zoo.there(name))
    vlm = zoo.build(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float64)
    first, second = (zoo.ask(vlm, tiny.picture(seed, 48, 48)) for seed in (1, 2))
    return vlm, first, second


def run_with_gradients(vlm: mv.VLM, prompt: mv.Prompt) -> tuple[dict, dict]:
    what = pass_of(vlm, {}, prompt, [*stream_sites(vlm), *write_sites(vlm)], grad_of=metric)
    what.plan.reads.update(dict.fromkeys(raw_sites(inputs_of(vlm))))
    shows = passed(vlm.model, vlm.arch, vlm.shape.logit_cap, Visit(what.plan), what)
    read = {site: of_groups(steps[0]) for site, steps in shows["saved"].items()}
    return read, {site: of_groups(found) for site, found in shows["grads"].items()}


@every_architecture
def test_what_the_readers_of_a_layer_take_is_what_the_stream_loses(name: str) -> None:
    vlm, prompt, _ = asked(name)
    read, gradients = run_with_gradients(vlm, prompt)
    how, everywhere = inputs_of(vlm), range(len(prompt))
    for layer, kinds in enumerate(vlm.shape.kinds["text"]):
        heads = attention_gradients(vlm.model, how, layer, read, gradients, everywhere)
        before = gradients["resid_pre", layer, "text"][0]
        assert heads.abs().amax((1, 2)).max() > 0
        if "resid_mid" in kinds:
            behind = gradients["resid_mid", layer, "text"][0]
            assert (heads.sum(0) - (before - behind)).abs().max() < 1e-6 * before.abs().max()
        else:
            rest = mlp_gradient(how, layer, gradients, heads, everywhere)
            assert rest.abs().max() > 0


@every_architecture
def test_a_score_is_the_slope_of_the_patch_of_its_edge(name: str) -> None:
    vlm, source, target = asked(name)
    found = mv.edge_attribution(vlm, source, target, metric, method="eap").score
    shape, everywhere = vlm.shape, range(len(target))
    last = shape.layers["text"] - 1
    some = [Node.parse(one) for one in readers(shape)]
    some = [node for node in some if node.layer in (0, last, None) and node.head in (None, 1)]
    edges = [(f"m{node.layer - 1}" if node.layer else "image", node.name) for node in some]
    edges += [(f"a{last}.h2", "logits"), (f"m{last}", "logits")]
    sites = [*write_sites(vlm), *dict.fromkeys(site for _, one in edges for site in restored_sites(shape, one))]
    runs = [vlm.run(prompt, sites) for prompt in (source, target)]
    wrote = [
        written(vlm.model, writing(vlm), {(s.kind, s.layer, s.tower): run[s] for s in sites}, target.image)
        for run in runs
    ]
    own = {site: runs[1][site] for site in sites}
    variants = [
        edge_edits(shape, reader, step * (wrote[0][writer] - wrote[1][writer]), everywhere, own)
        for writer, reader in edges
        for step in STEPS
    ]
    values = metric(vlm.run(target, variants=variants).logits).reshape(-1, len(STEPS))
    near, far = ((values[:, at] - values[:, -1 - at]) / (2 * STEPS[at]) for at in (1, 0))
    slopes = (4 * near - far) / 3  # without the first term of what a difference misses
    scores = torch.tensor([float(found.sel(writer=writer, reader=reader)) for writer, reader in edges])
    assert (scores != 0).sum() > len(edges) / 2
    assert (slopes - scores).abs().max() < 1e-3 * scores.abs().max()


@every_architecture
def test_the_norm_before_attention_is_where_it_is_said_to_be(name: str) -> None:
    vlm, _, _ = asked(name)
    for stack in vlm.arch.stacks.values():
        for (where, index), block in zip(stack.layers, stack.blocks, strict=True):
            if block.pre is not None:
                assert "norm" in type(vlm.hf.get_submodule(f"{where}.{index}.{block.pre}")).__name__.lower()
