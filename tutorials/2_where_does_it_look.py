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
# # 2. Where does it look, and does it matter?
#
# Attention maps are easy to draw and easy to believe. Here is one model in which every layer looks at the image,
# and in which almost none of that looking is used.

# %%
import mechvlm as mv

vlm = mv.load("demo")
real = vlm.prompt(mv.demo.scenes()[0].image, "Is there a 9 in the image?")
null = real.with_image(mv.images.black)
yes = mv.logit_difference("yes", "no")
mv.answer_probabilities(vlm, {"real": real, "null": null}, ["yes", "no"]).to_pandas().round(3)

# %% [markdown]
# **Where does it look?** The attention of all text positions after the image, divided over the spans of the prompt.
# It is on the image in every layer.

# %%
profile = mv.attention_profile(vlm, real, queries="text")
mass = profile.mass.mean(["example", "head"], keep_attrs=True)
mv.plot.lines(mass, x="layer", colour="span", title="Every layer looks at the image")

# %% [markdown]
# **Does it matter?** Cut it, one layer at a time: an edge from some keys to some queries becomes exactly zero, and
# the softmax divides the rest. `sweep` runs every point of a grid and batches them.

# %%
edges = {
    "image to question": (real.image, real.question),
    "image to last": (real.image, real.last),
    "question to last": (real.question, real.last),
}


def cut(layer: int, edge: str) -> list[mv.Edit]:
    keys, queries = edges[edge]
    return [mv.cut_attention(layer, keys, queries)]


after = mv.sweep(vlm, real, cut, yes, layer=range(vlm.shape.layers["text"]), edge=list(edges))
after.to_pandas().round(1)

# %% [markdown]
# Only two of these matter. In the first layer the question takes what it needs from the image, and in the last
# layer the last position takes the answer from the question. Patching says the same from the other side: put what
# enters a layer with the real picture into the run with the black one, span by span.

# %%
patched = mv.patch_spans(vlm, source=real, target=null, metric=yes)
mv.plot.heatmap(patched.normalised, title="Where the answer is, on its way through the layers")

# %% [markdown]
# So attention on the image and its use are two different things. Both in one figure: the image's attention mass in
# each layer, and how much of the answer is lost when the same attention is cut.

# %%
import xarray as xr

clean = float(vlm.metric(yes)(vlm.run(real).logits)[0])
lost = (clean - after.sel(edge="image to question", drop=True)) / (clean - patched.attrs["target_metric"])
both = xr.concat(
    [mass.sel(span="image", drop=True), lost], xr.Variable("what", ["attention on the image", "answer lost without"])
)
both = both.rename("share").assign_attrs(long_name="share")
mv.plot.lines(both, x="layer", colour="what", title="Looking is not using")
