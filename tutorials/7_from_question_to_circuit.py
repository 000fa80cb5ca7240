# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. From one question to a circuit
#
# Which parts of a model, wired to which others, answer “Is there a red 3 in the image?” Patching every node, one
# after the other, says so and takes hours on a large model; gradients say it for all nodes, and all edges between them,
# in a few passes, to first order. Here each shortcut comes with its error, and the circuit at the end is tested on
# pictures that it was not found on.
#
# **Pairs.** A picture with something red or green in it, and the same with red and green swapped in that square, so
# that the right answer changes from yes to no. Scenes whose two answers are right, some to find the circuit on and
# others to test it.

# %%
import tempfile

import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image

import mechvlm as mv

vlm = mv.load("demo")
yes = mv.logit_difference("yes", "no")
margin = vlm.metric(yes)


def squares(picture, name: str) -> list[tuple[int, ...]]:  # left, top, right, bottom
    corners = [(24 * (item.cell % 3), 24 * (item.cell // 3)) for item in picture.scene.items if item.name == name]
    return [(x, y, x + 24, y + 24) for x, y in corners]


def swapped(picture, name: str) -> Image.Image:
    image = picture.image
    for box in squares(picture, name):
        red, green, blue = image.crop(box).split()
        image.paste(Image.merge("RGB", (green, red, blue)), box[:2])
    return image


pairs = []  # with the thing, and without
for picture in mv.demo.scenes():
    things = [item.name for item in picture.scene.items if item.name.split()[0] in ("red", "green")]
    if not things or len(pairs) == 20:
        continue
    question = f"Is there a {things[0]} in the image?"
    both = [vlm.prompt(image, question) for image in (picture.image, swapped(picture, things[0]))]
    with_it, without = (float(margin(vlm.run(prompt).logits)) for prompt in both)
    if with_it > 0 > without:
        pairs.append(both)
find, test = pairs[:12], pairs[12:]
real, other = pairs[0]
print(len(find), "pairs to find the circuit on,", len(test), "to test it;", real.words)

# %% [markdown]
# **All patches at once.** Attribution patching: what each activation would do to the answer if it were taken from the
# picture without the thing, to first order, from two passes forward and one back. `verify=` makes some of these
# patches, those with the largest estimates and random ones.

# %%
kinds = ["resid_pre", "z", "mlp_out"]
into_no = mv.attribution_patching(vlm, source=real, target=other, metric=yes, kinds=kinds, verify=20)
into_yes = mv.attribution_patching(vlm, source=other, target=real, metric=yes, kinds=kinds, verify=20)
mv.plot.attributed(into_yes)

# %%
rows = {}
for name, found in (("from no to yes", into_no), ("from yes to no", into_yes)):
    for kind in kinds:
        one = found.sel(kind=kind)
        r = {f"Pearson's r, {among}": float(one.pearson.sel(among=among)) for among in ("top", "both")}
        rows[name, kind] = r | {end: float(one[end]) for end in ("precision", "missed", "missed_share")}
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# The nodes that matter most are all found, and their sizes are not. From yes to no (the figure) it is worse than from
# no to yes: the answer to a picture with the thing is a confident yes, and the gradient is that at the beginning of a
# long way. A precision of 1 says that the 20 nodes with the largest estimates have the largest effects of those that
# were patched; what was not patched is not in it. The last two columns say what may be there: no larger share than
# `missed_share` of the other nodes is wrong by more than `missed`, at 95 % confidence.
#
# **Where gradients fail, and what helps.** Queries and keys act through the softmax of attention. Where a head looks at
# one place with all it has, the gradient there is next to nothing, while another key would turn the head away. AtP\*
# makes the softmax anew (`qk`); integrated gradients take the whole way from one picture to the other (`ig`). All keys
# of layer 0, patched from the picture with the thing into the one without, and what each method says of them:

# %%
given = {"source": real, "target": other, "metric": yes, "kinds": ["k"], "layers": [0]}
exact = mv.attribution_patching(vlm, **given, verify=10_000)
places = {"layer": exact.node_layer[0], "position": exact.node_position[0], "kv_head": exact.node_head[0]}
places = {name: xr.DataArray(place.values, dims="node") for name, place in places.items()}
truth, rows = exact.exact[0].values, {}
for method in ("atp", "qk", "ig"):
    estimate = mv.attribution_patching(vlm, **given, method=method).k.sel(places).values
    top, best = (set(np.argsort(-np.abs(values))[:20]) for values in (estimate, truth))
    rows[method] = {"Pearson's r": np.corrcoef(estimate, truth)[0, 1], "precision at 20": len(top & best) / 20}
print(f"{len(truth)} keys, all patched")
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# That is one pair; a table of every method and site over 50 scenes is in
# [docs/attribution.md](../docs/attribution.md).
#
# **Who says yes?** The answer's logits are a sum of what each part wrote at the last position, with the final norm's
# scale held. What a head wrote there is a sum over the positions it looked at, so there is a map of what comes straight
# from the picture.

# %%
direct = mv.direct_logit_attribution(vlm, [real, other], yes, by="token")
mv.plot.direct_logits(direct.isel(prompt=0))

# %%
through = direct.by_token.sum(["layer", "head"]).isel(prompt=0)
whole = direct.isel(prompt=0)
print(f"yes - no: {float(whole.metric):.2f}, of which straight from the image {float(through.sum()):.2f}")
mv.plot.over_image(through, real.images[0], real.pictures[0], title="Logit through the image")

# %% [markdown]
# Two heads of the last layer say it, and what they read is not the picture: that has been taken up by the question's
# words long before.
#
# **Edges.** Who writes what they read? An edge goes from a part that writes into the residual stream to a part that
# reads there: a head's queries, its keys, its values (which several heads share here), an MLP, the logits. Edge
# attribution, with gradients averaged over five points between the two pictures (EAP-IG), kept apart by span, and
# beside some of the edges patched exactly.

# %%
scores = [mv.edge_attribution(vlm, source=b, target=a, metric=yes, spans="each") for a, b in find]
checked = mv.edge_attribution(vlm, source=other, target=real, metric=yes, spans="each", verify=40)
mv.plot.edges(checked, top=25)

# %%
plain = mv.edge_attribution(vlm, source=other, target=real, metric=yes, method="eap", spans="each", verify=40)
pd.DataFrame(
    {
        name: {
            "Pearson's r, 40 top and 40 random": float(one.pearson.sel(among="both").item()),
            "precision at 40 of these": float(one.precision.item()),
            "largest error of a random edge": float(one.missed.item()),
        }
        for name, one in (("EAP", plain), ("EAP-IG", checked))
    }
).T.round(2)

# %% [markdown]
# **One path, exactly.** Path patching lets one sender's change through to chosen readers and freezes all else. Which
# heads and MLPs feed the values that the two heads of layer 7 read at the question?

# %%
paths = mv.path_patching(vlm, source=real, target=other, metric=yes, receivers=["a7.kv1<v>", "a7.kv1<k>"])
mv.plot.senders(paths.normalised, title="What reaches heads 7.2 and 7.3 by keys and values")

# %% [markdown]
# **The circuit.** The edges with the largest mean scores over the pairs that it is found on; what lies on no path from
# the input to the logits is left out. It is run by itself: along every edge outside it goes what was written for the
# other picture. Faithfulness is how much of the difference between the two pictures' answers that brings about, on
# pictures it was not found on, beside random circuits of as many edges; completeness is how much is left when its
# edges alone are taken away.

# %%
sizes = [40, 80, 160, 320]
sources, targets = [b for _, b in test], [a for a, _ in test]
faith = mv.circuit_faithfulness(vlm, scores, sources, targets, yes, sizes=sizes, controls=3)
mv.plot.faithfulness(faith)

# %%
said = np.vectorize("{:.2f} [{:.2f}, {:.2f}]".format)
table = {
    name: said(faith[f"{name}_mean"], faith[f"{name}_low"], faith[f"{name}_high"])
    for name in ("faithfulness", "completeness")
}
pd.DataFrame(
    {"edges": faith.n_edges, "nodes": faith.n_nodes, **table, "random, most": faith.random.max("sample").round(2)}
)

# %%
circuit = mv.choose_circuit(scores, 80)
folder = tempfile.mkdtemp()
circuit.save(f"{folder}/red_or_green.json")
assert mv.Circuit.load(f"{folder}/red_or_green.json") == circuit  # readable JSON
mv.plot.circuit(circuit)

# %%
pd.DataFrame([(str(edge), edge.score) for edge in circuit.edges[:12]], columns=["edge", "score"]).round(2)

# %% [markdown]
# Read it from the left: heads of layer 0 look, from the question's words, at the image tokens that match (it is their
# keys that differ, more than their values), and write into the words what they found; the first MLPs work on that;
# head 7.3, and 7.2, read it at the words and say it at the last position. How much of the answer this leaves out is in
# the table: what lacks is in many small edges, no few of them.
#
# **Is it the same circuit again?** From halves of the pairs that it was found on, and for another kind of question.

# %%
halves = mv.circuit_stability(lambda some: mv.choose_circuit(some, 80), scores, splits=10)
halves[["mean", "low", "high"]].to_dataframe().round(2)


# %%
def erased(picture, name: str) -> Image.Image:  # the thing's square as empty as an empty one
    image = picture.image
    empty = next(cell for cell in range(9) if cell not in [item.cell for item in picture.scene.items])
    x, y = 24 * (empty % 3), 24 * (empty // 3)
    for box in squares(picture, name):
        image.paste(picture.image.crop((x, y, x + 24, y + 24)), box[:2])
    return image


digits = []
for picture in mv.demo.scenes()[:40]:
    counts = pd.Series([item.digit for item in picture.scene.items]).value_counts()
    single = [item for item in picture.scene.items if counts[item.digit] == 1]
    if not single or len(picture.scene.items) == 9 or len(digits) == 12:
        continue
    question = f"Is there a {single[0].digit} in the image?"
    digits.append([vlm.prompt(image, question) for image in (picture.image, erased(picture, single[0].name))])
digit_scores = [mv.edge_attribution(vlm, b, a, yes, spans="each") for a, b in digits]
shared = mv.circuit_overlap(circuit, mv.choose_circuit(digit_scores, 80))
shared[["shared", "overlap", "expected", "p_value"]].to_dataframe().round(3)

# %% [markdown]
# **Into edits.** A circuit of nodes is a list of edits, for any experiment: here all heads and MLPs outside it get what
# they wrote for the other picture.

# %%
kept = mv.Circuit(chosen=[name for name in circuit.nodes if name[0] in "am"], heads=8, kv_heads=4)
alone = [float(margin(vlm.run(a, edits=kept.edits(vlm, source=b, target=a)).logits)) for a, b in test[:8]]
pd.DataFrame(
    {
        "whole model": [float(margin(vlm.run(a).logits)) for a, _ in test[:8]],
        f"{kept.n_nodes} nodes": alone,
        "other picture": [float(margin(vlm.run(b).logits)) for _, b in test[:8]],
    }
).round(1)

# %% [markdown]
# **Maps on the picture.** Which image tokens does the answer rest on? Gradients and attention give maps; taking tokens
# away in a map's order, and putting them in, tells what a map is worth, beside random orders.

# %%
names = ["occlusion", "attribution_patching", "integrated_gradients", "relevancy", "attention", "direct_logits"]
maps = mv.compare_maps(vlm, [a for a, _ in test[:3]], yes, names, samples=4, shares=np.linspace(0, 1, 6))
mv.plot.compared_maps(maps, test[0][0])

# %%
order = ["advantage_mean", "advantage_low", "advantage_high"]
maps[order].to_dataframe()[order].unstack("mode").round(2)

# %% [markdown]
# What to take home: an estimate without its error is a guess; the error is known after a few exact patches. Give the
# circuit's size beside its faithfulness, on other examples than those it was found on, beside random circuits; and say
# what it leaves out.
