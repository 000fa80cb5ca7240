"""What circuits refuse, word for word; `test_errors` runs all of it."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tiny
import xarray as xr
import zoo

import mechvlm as mv
from mechvlm.circuit_text import from_json
from mechvlm.experiments.circuit_edits import kept_at
from mechvlm.experiments.faithfulness import check_ends

Case = tuple[str, Callable[[], object]]
MODULES = ("choosing", "circuit_edits", "circuit_overlaps", "faithfulness", "random_circuits", "circuit_measures")
"""Of the experiments, those whose raises are all reached here; and of figures `wiring` and `faithful`."""
YES = mv.logit_difference("yes", "no")


@cache
def vlm() -> mv.VLM:
    return tiny.vlm()


@cache
def asked() -> mv.Prompt:
    return vlm().prompt(tiny.picture(), "is there a dog ?")


def read(text: str) -> object:
    return from_json(text, "circuit.json", ["edges"])


def scores(dims: tuple[str, ...] = (), **attrs: Any) -> xr.Dataset:
    """Of two edges."""
    values = np.array([[0.5, math.nan], [math.nan, 1.0]]).reshape(2, 2, *[1] * len(dims))
    along = {"writer": ["image", "a0.h0"], "reader": ["a0.h0<q>", "logits"]}
    return xr.Dataset({"score": (["writer", "reader", *dims], values)}, coords=along, attrs=attrs)


def chosen(given: Any = None, **settings: Any) -> object:
    return mv.choose_circuit(scores() if given is None else given, **{"count": 1, **settings})


def measured(circuits: Any = None, **settings: Any) -> object:
    given = mv.Circuit() if circuits is None else circuits
    return mv.circuit_faithfulness(vlm(), given, **{"sources": asked(), "targets": asked(), "metric": YES, **settings})


EDGE = mv.Edge("image", "m0")
BOTH = mv.Circuit(chosen=["m0"]), mv.Circuit(chosen=["m0", "m1"])
TOGETHER = (
    "circuits of edges and of chosen nodes, or of all edges but some, cannot be put together; give two that list "
    "edges, or two that list nodes."
)
CASES: list[Case] = [
    ("'logits' writes nothing; write for instance 'image', 'a3.h5' or 'm3'.", lambda: mv.Edge("logits", "m3")),
    ("'image' reads nothing; write for instance 'a3.h5<q>', 'm3' or 'logits'.", lambda: mv.Edge("embed", "image")),
    (
        "a3.h5 does not stand before a3.h6<q>, so there is no edge between the two; name an earlier writer, or a later "
        "reader.",
        lambda: mv.Edge("a3.h5", "a3.h6<q>"),
    ),
    ("score=inf is infinite; give a number, or leave it out.", lambda: mv.Edge("image", "m0", score=math.inf)),
    (
        "span=3 names no positions; write for instance 'image', or None for all.",
        lambda: mv.Edge("image", "m0", 3),  # type: ignore[arg-type]
    ),
    (
        "edges=3 cannot be a circuit's; write edges=[mv.Edge('image', 'a2.kv1<v>')], or chosen=['a3.h5', 'm3'] for "
        "nodes.",
        lambda: mv.Circuit(3),  # type: ignore[arg-type]
    ),
    (
        "edges=['m0'] cannot be a circuit's; write edges=[mv.Edge('image', 'a2.kv1<v>')], or chosen=['a3.h5', 'm3'] "
        "for nodes.",
        lambda: mv.Circuit(["m0"]),  # type: ignore[list-item]
    ),
    (
        "chosen=[(3, 5)] cannot be a circuit's; write names of heads and MLPs, chosen=['a3.h5', 'm3'].",
        lambda: mv.Circuit(chosen=[(3, 5)]),  # type: ignore[list-item]
    ),
    (
        "crossing=3 cannot be a circuit's; write layers, crossing=[3].",
        lambda: mv.Circuit(crossing=3),  # type: ignore[arg-type]
    ),
    (
        "'yes' is no metric; give mv.logit_difference('yes', 'no') or a function of logits (batch vocab), or a list "
        "with one for each prompt.",
        lambda: measured(metric="yes"),
    ),
    (
        "a circuit is of edges or of chosen nodes, and both were given; give one of the two.",
        lambda: mv.Circuit([EDGE], ["m0"]),
    ),
    (
        "'a3.h5<q>' cannot be chosen; name heads and MLPs as they write, 'a3.h5' or 'm3'.",
        lambda: mv.Circuit(chosen=["m0", "a3.h5<q>"]),
    ),
    ("image -> m0 is in the circuit more than once; give each once.", lambda: mv.Circuit([EDGE, EDGE])),
    (
        "heads=4 and kv_heads=3 do not fit; the first is a multiple of the second, and both are 0 where they are not "
        "known.",
        lambda: mv.Circuit(heads=4, kv_heads=3),
    ),
    (
        "candidates=(1,) are not three numbers, of edges, of heads and MLPs, and of heads; give 0 where it is not "
        "known.",
        lambda: mv.Circuit(candidates=(1,)),
    ),
    (
        "the circuit's node m0 is not in this model; name heads and MLPs that it has.",
        lambda: BOTH[0].kept(["image"], ["m1"]),
    ),
    (
        "one circuit's layers have 4 heads and 2 key-value heads and the other's 8 and 2, so they are not of one "
        "model; put circuits of one together.",
        lambda: mv.Circuit(heads=4, kv_heads=2) | mv.Circuit(heads=8, kv_heads=2),
    ),
    (
        "in this model m0 does not read what a0.h0 writes; leave the edge a0.h0 -> m0 out.",
        lambda: kept_at(zoo.build("aya_vision"), mv.Circuit([mv.Edge("a0.h0", "m0")]), [None]),
    ),
    (
        "the circuit's edge image -> m0 is not in this model; make the circuit of its own scores.",
        lambda: mv.Circuit([EDGE]).kept(["image"], ["m1"]),
    ),
    (
        "a circuit of all edges but some cannot be pruned; list the edges that it has.",
        (~mv.Circuit([EDGE])).pruned,
    ),
    (
        "the circuit does not say how many heads a layer has, which tells what a key-value head is part of; give "
        "heads= and kv_heads=.",
        lambda: mv.Circuit([EDGE]).pruned(),
    ),
    ("3 is no circuit; make it with mv.Circuit or mv.choose_circuit.", lambda: mv.Circuit() & 3),  # type: ignore[operator]
    (TOGETHER, lambda: mv.Circuit([EDGE]) | BOTH[0]),
    (TOGETHER, lambda: mv.Circuit([EDGE]) - ~mv.Circuit()),
    (
        "circuit.json holds no circuit; write one with circuit.save(path).",
        lambda: read("{broken"),
    ),
    (
        "circuit.json holds a circuit of version 9, and this is 1; update mechvlm.",
        lambda: read('{"format": "mechvlm circuit", "version": 9, "edges": []}'),
    ),
    (
        "circuit.json holds no circuit; write one with circuit.save(path).",
        lambda: read('{"format": "mechvlm circuit", "version": 1, "edges": [["image", "m0"]]}'),
    ),
    (
        "how='greedy' follows edges, and the scores are of nodes; write how='top'.",
        lambda: chosen(xr.Dataset({"z": (["layer", "head"], np.ones((1, 2)))}), how="greedy"),
    ),
    ("count=None and threshold=None; give one of the two.", lambda: chosen(count=None)),
    ("by='size' is not known; choose from 'abs', 'value'.", lambda: chosen(by="size")),
    ("how='best' is not known; choose from 'top', 'greedy'.", lambda: chosen(how="best")),
    ("count=3 cannot be taken of 2 edges; give a number from 1 to that.", lambda: chosen(count=3)),
    (
        "threshold=-1 leaves out no size; give one above 0, or by='value'.",
        lambda: chosen(count=None, threshold=-1),
    ),
    (
        "scores of edges and of nodes have no mean; give results of one kind.",
        lambda: chosen([scores(), xr.Dataset({"z": (["layer", "head"], np.ones((1, 2)))})]),
    ),
    ("sizes=[0, 5] hold 0; give numbers of edges or nodes from 1 on.", lambda: measured(scores(), sizes=[0, 5])),
    ("no score is 2 or more; the highest is 1.", lambda: chosen(count=None, threshold=2)),
    (
        "no edge of the top 1 by abs lies on a path from what enters to the logits; choose more of them, or "
        "how='greedy', which follows paths from the logits, or prune=False.",
        chosen,
    ),
    (
        "3 holds no scores of edges or of heads and MLPs; give what mv.edge_attribution returns, or "
        "mv.attribution_patching with kinds=['z', 'mlp_out'].",
        lambda: chosen(3),
    ),
    (
        "the scores have axes prompt too; take their mean over them, or give a list of results.",
        lambda: chosen(scores(("prompt",))),
    ),
    (
        "the results are of other nodes or spans than each other and have no mean; give like ones.",
        lambda: chosen([scores(), scores().isel(writer=[0])]),
    ),
    (
        "the scores do not say source_metric and target_metric in their attrs, so by='value' does not know which sign "
        "speaks for the target's answer; use by='abs'.",
        lambda: chosen(by="value"),
    ),
    (
        "the circuit has edges at the span 'moon', and the prompt's spans are bos, prefix, image, "
        "question, last; choose the circuit from scores of these.",
        lambda: measured(mv.Circuit([mv.Edge("image", "m0", "moon")])),
    ),
    (
        "the model's own metric is 2, and 0.5 where it is run as a circuit of all edges, or of none, so what circuits "
        "do is lost in rounding; load the model with dtype='float32'.",
        lambda: check_ends([2.0, -1.0], [0.5, -1.0]),
    ),
    ("scores make circuits of any size; give sizes, for instance sizes=[10, 100, 1000].", lambda: measured(scores())),
    ("3 is no circuit; make it with mv.Circuit or mv.choose_circuit.", lambda: measured([3])),
    (
        "sizes=[3] are of circuits yet to be chosen, and circuits were given; leave it out.",
        lambda: measured(sizes=[3]),
    ),
    (
        "2 sources were given for 1 targets; give one source for each target.",
        lambda: measured(sources=[asked(), asked()]),
    ),
    ("ablate='zero' is not known; choose from 'source', 'mean'.", lambda: measured(ablate="zero")),
    ("controls=-1 draws nothing; give 0 or more random circuits.", lambda: measured(controls=-1)),
    (
        "3 is no circuit; make it with mv.Circuit or mv.choose_circuit.",
        lambda: mv.circuit_overlap(3, 3),  # type: ignore[arg-type]
    ),
    (
        "all edges but some have no list to compare; give the circuit itself.",
        lambda: mv.circuit_overlap(~mv.Circuit(), mv.Circuit()),
    ),
    (
        "one circuit was chosen from 72 nodes and the other from 20, so they are not of like models and spans; compare "
        "circuits chosen from the same.",
        lambda: mv.circuit_overlap(mv.Circuit(candidates=(0, 72, 64)), mv.Circuit(candidates=(0, 20, 16))),
    ),
    (
        "one circuit's layers have 4 heads and 2 key-value heads and the other's 8 and 2, so they are not of one "
        "model; compare circuits of one.",
        lambda: mv.circuit_overlap(mv.Circuit(heads=4, kv_heads=2), mv.Circuit(heads=8, kv_heads=2)),
    ),
    (
        "the circuit is of a model whose layers have 16 heads and 2 key-value heads, and this one's have 4 and 2; make "
        "the circuit of its own scores.",
        lambda: measured(mv.Circuit([EDGE], heads=16, kv_heads=2)),
    ),
    (
        "make=Circuit(1 node: 1 MLP) is no function; write for instance lambda scores: mv.choose_circuit(scores, 50).",
        lambda: mv.circuit_stability(BOTH[0], [1, 2]),  # type: ignore[arg-type]
    ),
    (
        "examples and seeds were both given, or neither; give one of the two.",
        lambda: mv.circuit_stability(lambda _: BOTH[0]),
    ),
    (
        "seeds=[1] make 1 circuits to compare; give at least 2.",
        lambda: mv.circuit_stability(lambda _: 3, seeds=[1]),  # type: ignore[arg-type,return-value]
    ),
    (
        "3 examples in 1 clusters cannot be divided 20 times; give a cluster for each example, at least 2 clusters and "
        "1 split.",
        lambda: mv.circuit_stability(lambda _: BOTH[0], [1, 2, 3], clusters=["a", "a", "a"]),
    ),
    (
        "circuit draws a circuit, not a int; make it with mv.choose_circuit.",
        lambda: mv.plot.circuit(3),  # type: ignore[arg-type]
    ),
    (
        "Circuit(0 edges, 0 nodes) lists nothing to draw; give a circuit that lists edges or nodes.",
        lambda: mv.plot.circuit(mv.Circuit()),
    ),
    (
        "faithfulness draws what circuit_faithfulness returns, and was given a Dataset; make it with "
        "mv.circuit_faithfulness.",
        lambda: mv.plot.faithfulness(scores()),
    ),
]
