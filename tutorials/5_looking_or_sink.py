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
# # 5. Is it looking, or is it a sink?
#
# In large models a few tokens draw most of the attention and have nothing to say: attention sinks, among them
# background tokens of the picture. They are what is brightest in an attention map. Here we know the truth, because
# we make the sink ourselves; then we see which maps fall for it, and check each map by taking away what it points at.
#
# **A sink, made on purpose.** The last image token shows an empty corner. In six layers every position is drawn to it
# (a bias on its score) and receives nothing from it (its values are zero). `with_edits` makes that a model of its own,
# for any experiment.

# %%
import pandas as pd
import torch

import mechvlm as mv

vlm = mv.load("demo")
yes = mv.logit_difference("yes", "no")
scene = mv.demo.scenes()[0]
real = vlm.prompt(scene.image, "Is there a 7 in the image?")
corner = real.image[-1]


def silent(v: torch.Tensor) -> torch.Tensor:  # batch pos kv_head d_head
    v[:, corner] = 0
    return v


made = [mv.bias_attention(layer, keys=[corner], amount=5.0) for layer in range(1, 7)]
made += [mv.Edit(mv.Site("v", layer), silent) for layer in range(1, 7)]
sinky = vlm.with_edits(made)

null = real.with_image(mv.images.black)
answers = {
    name: mv.answer_probabilities(one, {"real": real, "null": null}, ["yes", "no"])
    for name, one in {"as it is": vlm, "with a sink": sinky}.items()
}
pd.concat({name: answer.to_pandas() for name, answer in answers.items()}).round(3)

# %% [markdown]
# It answers as before. What it seems to look at is another matter: five numbers that papers call visual attention,
# with and without the sink's column. Without it each row is made to sum to one again, before anything is averaged.

# %%
names = ["mass", "density", "density_share", "lift", "vas"]


def image_numbers(without: list[int] | None) -> pd.DataFrame:
    profile = mv.attention_profile(sinky, real, without=without).sel(span="image")
    return profile[names].mean(["example", "head"]).to_dataframe()[names]


pd.concat({"all columns": image_numbers(None), "without the sink": image_numbers([corner])}, axis=1).round(2)

# %% [markdown]
# **Find it.** `sinks` looks for two signs. By mass: a token that is paid, by all that see it, several times what even
# attention would pay. By activation: a state with a massive value in the dimensions where the first token's is massive
# (above 20 root mean squares, which a state of this model's 128 numbers cannot reach). Ours was made by its score
# alone, and only the first sign shows it.

# %%
found = mv.sinks(sinky, real)
print("by mass:", mv.sink_positions(found, "mass"), " by activation:", mv.sink_positions(found), " made:", [corner])
mv.plot.sinks_over_image(found, real, title="The sink that was made, found by its mass")

# %% [markdown]
# **The map, and the map without the sink.** The position that answers, layer 3, averaged over heads.

# %%
attention = mv.attention_map(sinky, real, 3)
mv.plot.over_image(attention, real.images[0], real.pictures[0], title="Attention: the brightest token is the sink")

# %%
rest = attention.where(attention.position != corner, 0.0)
mv.plot.over_image(rest, real.images[0], real.pictures[0], title="The same without it: another map altogether")

# %% [markdown]
# **The causal check.** Take the tokens away where they enter the language model, the brightest first (a black
# picture's tokens take their places), and compare with random orders of the same counts. If the map points at what the
# answer rests on, the answer falls sooner than by chance.

# %%
mv.plot.deletion(
    mv.deletion_curve(sinky, real, attention, yes), title="Attention, the sink first: no better than chance"
)

# %%
mv.plot.deletion(mv.deletion_curve(sinky, real, rest, yes), title="Attention without the sink: no better either")

# %% [markdown]
# Taking out the sink makes another map of it, and not a better one: in this model most of what is looked at is not
# used (tutorial 2). Attention weighted by its gradient, through all layers (`relevancy`, Chefer et al.), is another
# matter: weights that change nothing have no gradient, so the sink drops out by itself.

# %%
relevancy = mv.relevancy(sinky, real, yes).relevancy
mv.plot.over_image(relevancy, real.images[0], real.pictures[0], title="Relevancy: the squares of the 7")

# %%
mv.plot.deletion(mv.deletion_curve(sinky, real, relevancy, yes), title="Relevancy: a few tokens carry the answer")

# %% [markdown]
# One picture proves little. The same for four pictures that hold a digit, and five maps: how much lower the curve lies
# than random ones, as a share of all there is to lose (0: chance).


# %%
def maps(prompt: mv.Prompt) -> dict:
    seen = mv.attention_map(sinky, prompt, 3)
    dark = prompt.with_image(mv.images.black)
    return {
        "attention": seen,
        "attention without the sink": seen.where(seen.position != corner, 0.0),
        "rollout": mv.attention_rollout(sinky, prompt).rollout,
        "relevancy": mv.relevancy(sinky, prompt, yes).relevancy,
        "integrated gradients": mv.integrated_gradients(sinky, prompt, yes, baseline=dark).attribution,
    }


rows = {}
for number, picture in enumerate(mv.demo.scenes()[:4]):
    prompt = vlm.prompt(picture.image, f"Is there a {picture.scene.items[0].digit} in the image?")
    for name, ranking in maps(prompt).items():
        curve = mv.deletion_curve(sinky, prompt, ranking, yes, counts=[0, 4, 16, 36], samples=4)
        rows[number, name] = float(curve.advantage.mean())
pd.Series(rows).unstack(0).rename_axis(columns="picture").assign(mean=lambda table: table.mean(axis=1)).round(2)

# %% [markdown]
# What to take home: an attention map shows where weights are, and sinks have many; say which columns were left out; and
# put a causal check beside every map.
