"""TransformerLens's attribution patching, handed the picture, scores the same model as `mv.attribution_patching` does.

It calls a model with tokens alone, so without more it scores a run in which nobody sees a picture. Here what belongs to
the tokens, the picture with all that the processor made of it, is added as the bridge is called. Source and target
differ in the picture and in one word, by which the two are told apart. What TransformerLens calls clean and corrupt are
source and target: both patch from the first into the second, in whose run the gradients are taken.

Skipped where TransformerLens is not installed; `.ci/run` has an environment that holds it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
import zoo
from test_bridge import BOTH, NATIVE
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import mechvlm as mv
from mechvlm import bridge
from mechvlm.experiments.circuit_runs import circuit_metrics
from mechvlm.nodes import readers

pytestmark = [
    pytest.mark.transformer_lens,
    pytest.mark.skipif(not bridge.installed(), reason="TransformerLens is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what TransformerLens imports
]

SAME = 1e-9
"""The largest difference there may be, over the largest score; all runs here are in double precision."""

FULL = {"num_key_value_heads": 4}
UNGROUPED: dict[str, dict[str, int]] = {
    "llava_next-vicuna": {},
    "llava-siglip": FULL,
    "llava_onevision": FULL,
    "mistral3": FULL,
}
"""Models of whose edges TransformerLens has scores, and what gives them as many key-value heads as heads."""

NAMES = {
    "embed": "embed",
    "attn_head_out": "a{0}.h{1}",
    "mlp_out": "m{0}",
    "q_input": "a{0}.h{1}<q>",
    "k_input": "a{0}.kv{1}<k>",
    "v_input": "a{0}.kv{1}<v>",
    "mlp_in": "m{0}",
    "logits": "logits",
}
"""The parts that both know, by TransformerLens's kinds. It has none for the picture."""

Named = tuple[str, str]


def difference(logits: Tensor) -> Tensor:
    """The metric, for both: one word's logit less another's, at the last position."""
    last = logits[:, -1] if logits.ndim == 3 else logits
    return last[:, 30] - last[:, 31]


def of_one(logits: Tensor) -> Tensor:
    """The same as one number, as TransformerLens wants it."""
    return difference(logits)[0]


class Pair:
    """A model in both engines, and two prompts that differ in the picture and in one word."""

    def __init__(self, name: str, **more: Any) -> None:
        variant = zoo.VARIANTS[name]
        processor = None if variant.needs_torchvision and variant.encoding else variant.processor()
        self.vlm = mv.VLM(variant.model("eager", torch.float64, **more), processor, name=name)
        self.source, self.target = self.asked(0, "picture"), self.asked(1, "image")
        self.model = bridge.bridged(self.vlm).model
        self.model.original_model.requires_grad_(True)  # its hook of the embeddings comes before all that would ask

    def asked(self, seed: int, word: str) -> mv.Prompt:
        return zoo.ask(self.vlm, tiny.picture(seed, 40, 28), f"what is in the {word} ?")

    def shows(self, *more: mv.Prompt) -> None:
        """Let the bridge be called with what belongs to the tokens of these prompts beside them."""
        prompts = [self.source, self.target, *more]

        def add(_model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            (one,) = [prompt for prompt in prompts if torch.equal(tokens(prompt), args[0])]
            rest = {key: x for key, x in one.encoding.items() if key != "input_ids"}
            return args, {**kwargs, **{key: x.double() if x.is_floating_point() else x for key, x in rest.items()}}

        self.model.register_forward_pre_hook(add, with_kwargs=True)

    def scored(self, granularity: str = "node") -> Any:
        """What TransformerLens makes of it."""
        from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

        how = EdgeAttributionConfig(granularity=granularity)
        return attribution_patch(self.model, tokens(self.source), tokens(self.target), of_one, how)

    def edges(self) -> dict[Named, float]:
        """TransformerLens's scores of edges, summed over positions, by the names that parts have here."""
        found: dict[Named, float] = {}
        for edge, score in self.scored("edge").edge_scores.items():
            found[named(edge)] = found.get(named(edge), 0.0) + score
        return found

    def faithful(self, kept: Iterable[Named], calibration: list[mv.Prompt] | None = None) -> Any:
        """TransformerLens's faithfulness of some edges at all positions, explaining the source."""
        from transformer_lens.tools.analysis import attribution_patching as theirs

        some = set(kept)
        circuit = [edge for edge in self.scored("edge").edge_scores if named(edge) in some]
        how = theirs.FaithfulnessConfig(ablation="mean" if calibration else "corrupt")
        means = torch.cat([tokens(prompt) for prompt in calibration]) if calibration else None
        ends = tokens(self.source), tokens(self.target)
        return theirs.faithfulness(self.model, *ends, of_one, circuit, how, mean_tokens=means)


def tokens(prompt: mv.Prompt) -> Tensor:
    return prompt.encoding["input_ids"]


def named(edge: Any) -> Named:
    """The names of an edge's ends here."""
    writer, reader = (NAMES[node.kind].format(node.layer, node.head) for node in edge)
    return writer, reader


def seeing(name: str, **more: Any) -> Pair:
    """A pair of which TransformerLens sees the pictures too."""
    pair = Pair(name, **more)
    pair.shows()
    return pair


def tables(scores: dict[Any, float], like: xr.Dataset) -> dict[str, np.ndarray]:
    """TransformerLens's scores of nodes, laid out as those of `mv.attribution_patching`."""
    found = {kind: np.full(like[kind].shape, np.nan) for kind in ("z", "mlp_out", "embed")}
    for node, score in scores.items():
        if node.kind == "embed":
            found["embed"][node.position] = score
        elif node.kind == "mlp_out":
            found["mlp_out"][node.layer, node.position] = score
        else:
            found["z"][node.layer, node.position, node.head] = score
    return found


def estimated(pair: Pair) -> xr.Dataset:
    return mv.attribution_patching(pair.vlm, pair.source, pair.target, difference, ["z", "mlp_out", "embed"])


def edges_of(pair: Pair) -> xr.DataArray:
    return mv.edge_attribution(pair.vlm, pair.source, pair.target, difference, method="eap").score


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in double precision. As they are they round to single, and edges agree to 7e-8 of the largest only."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for kind in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("name", BOTH)
def test_every_head_mlp_and_word_has_the_same_score(name: str) -> None:
    """With grouped queries, norms behind parts and attention that is left to transformers too."""
    pair = seeing(name)
    own = estimated(pair)
    for kind, scores in tables(pair.scored().node_scores, own).items():
        largest = np.abs(scores).max()
        assert largest > 1e-3
        assert np.abs(own[kind].values - scores).max() < SAME * largest


def test_one_wrong_picture_is_seen_in_the_scores() -> None:
    """The comparison can fail: with the pictures the other way round nothing is the same."""
    pair = Pair("llava")
    ends = pair.source, pair.target
    pair.source, pair.target = pair.asked(1, "picture"), pair.asked(0, "image")
    pair.shows()
    theirs = pair.scored().node_scores
    pair.source, pair.target = ends
    own = estimated(pair)
    for kind, scores in tables(theirs, own).items():
        assert np.abs(own[kind].values - scores).max() > 0.1 * np.abs(scores).max()


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_transformer_lens_has_no_score_for_the_picture(name: str) -> None:
    """Its embeddings are of words, and at image tokens of the placeholder that nobody reads."""
    pair = seeing(name)
    theirs = tables(pair.scored().node_scores, estimated(pair))["embed"]
    assert (theirs[pair.target.image] == 0).all()
    own = mv.attribution_patching(pair.vlm, pair.source, pair.target, difference, ["image_features"]).image_features
    assert np.abs(own.values[pair.target.image]).max() > np.abs(theirs).max() / 10


@pytest.mark.parametrize("name", BOTH)
def test_without_the_picture_transformer_lens_scores_a_run_that_sees_none(name: str) -> None:
    """It says nothing of it: there are placeholders, and their embeddings are read as words."""
    blind, pair = Pair(name), seeing(name)
    found, right = blind.scored().node_scores, np.array(list(pair.scored().node_scores.values()))
    assert all(score == 0 for node, score in found.items() if node.position in pair.source.image)
    with torch.no_grad():
        words = {"input_ids": tokens(blind.target), "attention_mask": torch.ones_like(tokens(blind.target))}
        alone = blind.vlm.hf(**words).logits
        assert torch.equal(blind.model(tokens(blind.target))[:, -1], alone[:, -1])
    assert np.abs(np.array(list(found.values())) - right).max() > 0.3 * np.abs(right).max()
    blind.target = blind.asked(1, "picture")  # another picture and the same words
    assert not any(blind.scored().node_scores.values())


@pytest.mark.parametrize("name", UNGROUPED)
@pytest.mark.usefixtures("exact_norms")
def test_every_edge_that_both_know_has_the_same_score(name: str) -> None:
    pair = seeing(name, **UNGROUPED[name])
    own, theirs = edges_of(pair), pair.edges()
    largest = max(map(abs, theirs.values()))
    assert max(abs(float(own.sel(writer=a, reader=b)) - score) for (a, b), score in theirs.items()) < SAME * largest
    rest = own.sel(writer=[writer for writer in own.writer.values if writer != "image"])
    assert int(rest.notnull().sum()) == len(theirs), "all edges are compared but those of the picture"
    assert float(np.abs(own.sel(writer="image")).max()) > largest / 100
    assert sum(score != 0 for (writer, _), score in theirs.items() if writer == "embed") > 3
    assert sum(score != 0 for score in theirs.values()) > len(theirs) / 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llava", r"n_key_value_heads=2 for n_heads=4 \(GQA/MQA\), so its K/V inputs are not per query"),
        ("gemma3", "normalized or scaled before the residual add on this architecture"),
        ("glm4v", "normalized or scaled before the residual add on this architecture"),
    ],
)
def test_edges_that_transformer_lens_refuses(name: str, said: str) -> None:
    """Grouped queries, and norms behind attention; `mv.edge_attribution` takes both."""
    pair = seeing(name)
    with pytest.raises(ValueError, match=said):
        pair.scored("edge")
    assert float(np.abs(edges_of(pair)).max()) > 0.01


@pytest.mark.parametrize("name", [name for name in NATIVE if name != "glm4v"])
def test_edges_of_attention_left_to_transformers_are_refused_by_transformer_lens(name: str) -> None:
    pair = seeing(name, **FULL)
    with pytest.raises(NotImplementedError, match="use_attn_result: none of this model's attention bridges support"):
        pair.scored("edge")
    assert float(np.abs(edges_of(pair)).max()) > 0.01


def largest_edges(pair: Pair, count: int) -> list[Named]:
    """Every second of the edges with the largest scores: a circuit that is neither nothing nor all."""
    found = pair.edges()
    return sorted(found, key=lambda edge: -abs(found[edge]))[: 2 * count : 2]


def picture_edges(vlm: mv.VLM) -> list[Named]:
    return [("image", reader) for reader in readers(vlm.shape)]


def check(pair: Pair, theirs: Any, edges: list[Named], others: Any) -> None:
    """Hold what TransformerLens says of a circuit against the metric of some edges here."""
    kept = [(writer, reader, None) for writer, reader in edges]
    (alone,) = circuit_metrics(pair.vlm, pair.source, others, [kept], difference)
    first, last = (float(difference(pair.vlm.run(prompt).logits)) for prompt in (pair.source, pair.target))
    assert [theirs.full_metric, theirs.corrupt_metric] == pytest.approx([first, last], abs=SAME)
    assert theirs.recovered == pytest.approx((alone - last) / (first - last), abs=SAME)


@pytest.mark.parametrize("name", ["llava_next-vicuna", "llava-siglip"])
@pytest.mark.usefixtures("exact_norms")
def test_a_circuit_does_the_same_alone(name: str) -> None:
    """TransformerLens's clean prompt is the one that is explained, so here the target of a circuit."""
    pair = seeing(name, **UNGROUPED[name])
    for count in (40, 100):
        kept = largest_edges(pair, count)
        theirs = pair.faithful(kept)
        check(pair, theirs, [*kept, *picture_edges(pair.vlm)], pair.target)
        assert min(abs(theirs.recovered), abs(theirs.recovered - 1)) > 0.01


@pytest.mark.usefixtures("exact_norms")
def test_no_circuit_of_transformer_lens_is_without_the_picture() -> None:
    """It has no edges from the picture, so whatever is left out, every reader sees the clean one."""
    pair = seeing("llava-siglip", **FULL)
    kept = list(pair.edges())
    theirs = pair.faithful(kept)
    assert theirs.recovered == pytest.approx(1, abs=SAME)
    check(pair, theirs, [*kept, *picture_edges(pair.vlm)], pair.target)
    (less,) = circuit_metrics(pair.vlm, pair.source, pair.target, [[(*edge, None) for edge in kept]], difference)
    assert abs(less - theirs.full_metric) > 0.1 * abs(theirs.full_metric - theirs.corrupt_metric)


@pytest.mark.usefixtures("exact_norms")
def test_a_circuit_beside_the_mean_of_other_prompts_does_the_same() -> None:
    pair = Pair("llava-siglip", **FULL)
    others = [pair.asked(2, "red"), pair.asked(3, "dog")]
    pair.shows(*others)
    kept = largest_edges(pair, 60)
    theirs = pair.faithful(kept, others)
    check(pair, theirs, [*kept, *picture_edges(pair.vlm)], others)
    assert min(abs(theirs.recovered), abs(theirs.recovered - 1)) > 0.01
