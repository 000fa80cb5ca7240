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
# # 6. What flows from image to answer
#
# One question about the picture, “Is there a red 3 in the image?”, and one after another the causal methods that say
# how the picture reaches the answer: through which positions, heads and layers. Each has its blind side, so they are
# worth most together.
#
# **A minimal pair.** Two pictures that differ in one thing. Swapping red and green in the square of the 3 changes its
# colour, and the right answer from yes to no. (A black picture would change all there is to see, at once.)

# %%
import numpy as np
import pandas as pd
import torch
import xarray as xr
from PIL import Image

import mechvlm as mv

vlm = mv.load("demo")
question = "Is there a red 3 in the image?"
yes = mv.logit_difference("yes", "no")
layers = range(vlm.shape.layers["text"])


def boxes(picture) -> list[tuple[int, ...]]:  # of the red 3s: left, top, right, bottom
    corners = [(24 * (item.cell % 3), 24 * (item.cell // 3)) for item in picture.scene.items if item.name == "red 3"]
    return [(x, y, x + 24, y + 24) for x, y in corners]


def in_green(picture) -> Image.Image:
    image = picture.image
    for box in boxes(picture):
        red, green, blue = image.crop(box).split()
        image.paste(Image.merge("RGB", (green, red, blue)), box[:2])
    return image


scenes = [picture for picture in mv.demo.scenes() if boxes(picture)]
pairs = [mv.MinimalPair(one.image, in_green(one), question, "yes", "no", cluster=one.file.stem) for one in scenes]
prompts = [pair.prompts(vlm) for pair in pairs]
real, other = prompts[0]

shown = Image.new("RGB", (592, 288), "white")
for at, image in enumerate((pairs[0].image_a, pairs[0].image_b)):
    shown.paste(image.resize((288, 288), Image.Resampling.NEAREST), (304 * at, 0))
shown

# %%
answers = mv.answer_probabilities(vlm, {"red 3": real, "green 3": other}, ["yes", "no"])
right = mv.answer_accuracy(vlm, [(a, "yes") for a, _ in prompts] + [(b, "no") for _, b in prompts])
print(f"{len(pairs)} such pairs; of their {right.size} answers {int(right.sum())} are right")
answers.to_pandas().round(3)

# %% [markdown]
# **Where is it, layer by layer?** Patch what one position holds before a layer from the run with the red 3 into the
# run with the green one (`denoise`: what suffices for a yes), and the other way round (`noise`: what a yes needs). 0:
# no effect; 1: the other picture's answer. Look for what is dark: image tokens are so before layer 0 only, from then
# on the word “red” is, and faintly the last position.

# %%
each = mv.patch_positions(vlm, source=real, target=other, metric=yes, direction="both")
mv.plot.patched_positions(each.normalised.sel(direction="denoise"), title="What suffices: one position, one layer")

# %% [markdown]
# And over the picture, before the first layers: the four squares of the 3, and only before layer 0.

# %%
first = each.normalised.sel(direction="denoise", position=real.image, layer=[0, 1, 2, 3])
mv.plot.layers_over_image(first, real, title="The picture hands it over in layer 0")

# %% [markdown]
# One picture proves little. All pairs whose two answers are right, with spans that mean the same in each (`the 3` are
# the image tokens of its square), both directions, and 95 % intervals over pictures.

# %%
(red,), (three,) = real.find("red"), real.find("3")
places = {image.tobytes(): boxes(one) for one in scenes for image in (one.image, in_green(one))}


def object_of(prompt: mv.Prompt) -> list[int]:
    found = [mv.tokens_in(prompt, box) for box in places[prompt.pictures[0].tobytes()]]
    return sorted(token for tokens in found for token in tokens)


def parts(prompt: mv.Prompt) -> dict[str, list[int]]:
    held = object_of(prompt)
    rest = [position for position in prompt.question if position not in (red, three)]
    return {
        "the 3": held,
        "rest of image": [position for position in prompt.image if position not in held],
        "word red": [red],
        "word 3": [three],
        "rest of question": rest,
        "last": prompt.last,
    }


def with_interval(found: xr.Dataset) -> xr.DataArray:
    said = np.vectorize("{:.2f} [{:.2f}, {:.2f}]".format)
    return xr.apply_ufunc(said, found["mean"], found["low"], found["high"])


spans = mv.patch_pairs(vlm, pairs, spans=parts, controls=0, layers=[0, 1, 2, 7])
print(spans.attrs["right"], "pairs with both answers right")
with_interval(spans.sel(direction="denoise")).transpose("span", "layer").to_pandas()

# %%
with_interval(spans.sel(direction="noise")).transpose("span", "layer").to_pandas()

# %%
mv.plot.patched_pairs(spans, "denoise", title="The object before layer 0, then words of the question")

# %% [markdown]
# Before layer 0 it is all at the object (1.01, and 0.00 at the rest of the image). One layer later nothing is left
# there that the answer would use: it is at two words of the question, from layer 2 on more at “red” (0.67 [0.54,
# 0.79]) than at “3” (0.19 [0.05, 0.34]), and a little at the last position. Before layer 1 the directions differ: each
# word by itself suffices for little (0.28 and 0.17), and a yes is lost without either (0.83 and 0.72). It takes both.
#
# **Which heads carry it?** The same with one head's output at a time (`z`, at all positions).

# %%
heads = mv.patch_pairs(vlm, pairs[::2], what="heads")
table = with_interval(heads).stack(at=["layer", "head"]).transpose("at", "direction").to_pandas()
strong = heads["mean"].min("direction").stack(at=["layer", "head"]).to_series().sort_values(ascending=False).index[:6]
table.loc[strong]

# %%
mv.plot.patched_pairs(heads, "denoise", title="Heads that carry the red 3, by themselves")

# %% [markdown]
# Five heads of 64: 7.3 carries 0.60 [0.57, 0.65] by itself, and the sixth of the list 0.02. The two in layer 0 are
# more needed (0.52 and 0.43) than sufficient (0.19 and 0.14).
#
# What do the five look at, with the red 3 and with the green one? Attention of the question's words and of the
# position that answers, on the object and on both words, averaged over pairs.


# %%
def looks(prompt: mv.Prompt, layer: int, head: int, query: int) -> dict[str, float]:
    site = mv.Site("pattern", layer)
    row = vlm.run(prompt, read={site: mv.rows([query])})[site][0, head, 0]
    return {name: float(row[parts(prompt)[name]].sum()) for name in ("the 3", "word red", "word 3")}


asked = [(0, 2, red), (0, 7, three), (1, 3, three), (7, 3, real.last[0]), (7, 2, real.last[0])]
rows = {
    (f"{layer}.{head} at “{real.tokens[query]}”", name): pd.DataFrame(
        [looks(pair[at], layer, head, query) for pair in prompts[::2]]
    )
    for layer, head, query in asked
    for at, name in enumerate(["red 3", "green 3"])
}
pd.DataFrame({name: found.mean() for name, found in rows.items()}).T.round(2)

# %% [markdown]
# Head 0.2 at “red” is on the object if it is red, and not if it is green; head 0.7 at “3” is on it in either colour.
# 7.3, where the answer is made, is on “3” for a yes and most of all on “red” for a no. Where a head looks is no proof
# of anything; that it is these heads that count was measured above.
#
# **Knockout.** Forbid attention between two spans, in one layer, in all heads. An edge is named as information goes;
# what changes is the logit difference of a yes.

# %%
edges = ["object->question", "rest->question", "object->last", "question->last"]
asked_of = [pair[0] for pair in prompts[:8]]
flow = mv.information_flow(vlm, asked_of, yes, ["yes"] * 8, edges, object_of, window=1, controls=2)
with_interval(flow).to_pandas()[[0, 1, 2, 7]]

# %%
mv.plot.flow(flow, title="Cut in one layer: the object to the question, the question to the answer")

# %% [markdown]
# Dashed: as many random keys, cut from the same queries. So many as the rest of the image has, 32 of fewer than 50, do
# hit the object's own. What costs most is the object to the question in layer 0 (-15.4); the object straight to the
# last position costs next to nothing: the picture goes by way of the question. From the question to the last position
# it is layers 1 (-1.6) and 7 (-3.9), and layer 0 as well (-9.8), where the question's words hold nothing of the
# picture yet: knockout also cuts what both pictures have in common, such as what is asked. Patching shows what
# differs.
#
# **The logit lens.** What is at the image tokens, decoded as words? First layer by layer, at the tokens of the 3: both
# of its words are there from the start, and “red” ends above “3”.

# %%
lens = mv.logit_lens(vlm, real, positions=real.image, words=["red", "3", "green"])
mv.plot.words_by_layer(lens, positions=object_of(real), title="At the tokens of the red 3")

# %% [markdown]
# And over the picture. In layer 3 it is the 3; by layer 7 the brightest token shows no digit at all.

# %%
held = mv.object_map(lens, real, "3", layer=layers)
mv.plot.layers_over_image(held, real, layers=[0, 3, 7], title="Where the lens reads “3”")


# %% [markdown]
# Is it where the thing is? The map of each word against the square of the red 3, as average precision over pixels (1:
# perfect; a blind map has the square's share of the picture).


# %%
def precision(at: int) -> xr.DataArray:
    prompt, mask = prompts[at][0], np.zeros((72, 72), bool)
    for left, top, right, bottom in boxes(scenes[at]):
        mask[top:bottom, left:right] = True
    lens = mv.logit_lens(vlm, prompt, positions=prompt.image, words=["red", "3", "9"])
    maps = [mv.object_map(lens, prompt, word, layer=layers) for word in ("red", "3", "9")]
    scores = [mv.segmentation_scores(one, prompt, mask) for one in maps]
    return xr.concat([one.average_precision for one in scores], pd.Index(["red", "3", "9"], name="word"))


scored = xr.concat([precision(at) for at in range(12)], "picture")
blind = np.mean([len(boxes(one)) / 9 for one in scenes[:12]])
print(f"blind: {blind:.2f}")
with_interval(mv.mean_interval(scored, "picture")).to_pandas()

# %% [markdown]
# “red” is where the red 3 is, in every layer (0.93 and more), “3” less so (0.74 to 0.83), and “9” at 0.40 at most,
# which is still more than blind. So the image tokens hold the words to the end, while the answer takes next to nothing
# from them after layer 0 (0.01 at most, above): what can be read somewhere need not be used there.
#
# **Causal tracing.** Noise on the image features of the 3, and what one layer left at one span put back as it was.

# %%
trace = mv.causal_trace(vlm, real, yes, objects=object_of(real), samples=8)
mv.plot.tracing(trace, title="Put back: the object too late, the question in time")

# %%
with_interval(trace).sel(span=["object", "question", "last"]).transpose("span", "layer").to_pandas()[[0, 1, 6, 7]]

# %% [markdown]
# Noise says what the pairs said, with another kind of damage: after layer 0 the object comes too late (0.1 of 17.8
# logits). The question brings back 17.7, later 16, and the last position the other 2; after the last layer that
# position is the answer, and has it all.
#
# **Are those heads needed, more than others?** Ablation to their mean over pictures: heads are ranked on 24 scenes
# with a 3 or something red (in 12 of them a red 3), and tested on 24 others.

# %%
near = [one for one in mv.demo.scenes() if any(item.digit == 3 or item.colour == 0 for item in one.scene.items)]
with_it, without = ([one for one in near if bool(boxes(one)) == there] for there in (True, False))
items = [
    [(vlm.prompt(one.image, question), said) for one in part[:24]] for part, said in ((with_it, "yes"), (without, "no"))
]
find, test = (items[0][start::2] + items[1][start::2] for start in (0, 1))
margins = [mv.logit_difference(said, "no" if said == "yes" else "yes") for _, said in find]
means = mv.mean_activations(vlm, [prompt for prompt, _ in find], positions="each")
effect = mv.ablate_each(vlm, [prompt for prompt, _ in find], margins, to=means)
top = mv.strongest(effect["mean"], 3)
pd.Series(
    {part: with_interval(effect).sel(layer=part[0], head=part[1]).item() for part in top}, name="effect on the margin"
)

# %%
correct = [mv.accuracy(vlm, said) for _, said in test]
order = mv.ablate_in_order(vlm, [prompt for prompt, _ in test], correct, top, to=means, controls=20)
pd.DataFrame(
    {
        "accuracy": with_interval(order).to_pandas(),
        "random sets": order.random.mean(["prompt", "sample"]).to_pandas().round(3),
        "worst random set": order.random.mean("prompt").min("sample").to_pandas().round(3),
        "p": order.p_value.to_pandas().round(3),
    }
)

# %%
mv.plot.ablation_order(order, title="Accuracy on scenes the heads were not found on")

# %% [markdown]
# Another method, half of it on pictures without a red 3, and the same heads first. One of them costs no answer, two
# cost 3 of 24, and without all three half of the answers are right, 0.50 [0.29, 0.71], which is guessing. No random
# set of three costs more than one answer (p = 1/21, the least that 20 sets can show).
#
# **An edit of your own.** Is there a direction that makes a green 3 red? Take the mean difference at the object's
# tokens over every second pair, add some of it to the green 3s of the other pairs, before some layer, and compare with
# a random direction of the same length. `sweep` runs each point of the grid from the layer and the position where its
# edits begin, which the edit says (`positions=`). With `out=` each finished batch is kept on disk, and a sweep that
# was stopped goes on from there.

# %%
import tempfile

sites = {layer: mv.Site("resid_pre", layer) for layer in layers}


def difference(layer: int) -> torch.Tensor:
    site, found = sites[layer], []
    for a, b in prompts[1::2]:
        streams = [vlm.run(prompt, read=[site])[site][0, object_of(prompt)] for prompt in (a, b)]
        found.append((streams[0] - streams[1]).mean(0))
    return torch.stack(found).mean(0)


draw = torch.Generator().manual_seed(0)
ways = {"found": {layer: difference(layer) for layer in (0, 1, 2, 7)}}
random = {layer: torch.randn(len(one), generator=draw) for layer, one in ways["found"].items()}
ways["random"] = {layer: one * ways["found"][layer].norm() / one.norm() for layer, one in random.items()}


def redder(prompt: mv.Prompt):
    tokens = object_of(prompt)

    def point(layer: int, amount: float, way: str) -> list[mv.Edit]:
        def edit(h: torch.Tensor) -> torch.Tensor:  # batch pos d_model
            h[:, tokens] += amount * ways[way][layer]
            return h

        return [mv.Edit(sites[layer], edit, positions=tokens)]

    return point


grid = {"layer": [0, 1, 2, 7], "amount": [0.0, 0.5, 1.0, 1.5], "way": ["found", "random"]}
others = [b for _, b in prompts[::2]]
with tempfile.TemporaryDirectory() as folder:
    swept = [mv.sweep(vlm, b, redder(b), yes, out=f"{folder}/{at}", **grid) for at, b in enumerate(others)]
    again = mv.sweep(vlm, others[0], redder(others[0]), yes, out=f"{folder}/0", **grid)  # read, not run
assert again.equals(swept[0])
print(swept[0].attrs["engine"])
steered = mv.mean_interval(xr.concat(swept, "picture"), "picture")
with_interval(steered).sel(layer=[0, 1]).stack(at=["layer", "way"]).transpose("at", "amount").to_pandas()

# %% [markdown]
# It takes one direction: added once before layer 0 it turns a no into a yes (6.6 [4.8, 8.1]), on pictures that it was
# not made from, where a random one leaves it at -8.3. Before layer 1 it changes nothing any more (-8.6), as everything
# above said.
#
# What to take home: patch between pictures that differ in what is asked and in nothing else; patch both ways; give the
# interval over pictures, and random sets beside what was found; and believe what several methods agree on.
