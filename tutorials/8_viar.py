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
# # 8. VIAR in one notebook
#
# VIAR (2026) says: in some middle layers a model looks away from the picture, and a bias on attention there makes it
# answer better. Here is the whole study on the demo model, every figure of it, with what the study lacked: a test of
# the zone, another picture to compare a black one with, random layers beside the chosen ones, and a moved threshold
# beside every edit. From a shell it is `mechvlm viar demo`, and `mechvlm viar demo zone` for one result.
#
# To be done in a minute or two it asks 300 of the 900 adversarial questions, and 120 for doses, layers and contrast;
# `mechvlm viar demo` asks all. Every finding below is printed by the run: a sentence made of its numbers, with 95 %
# intervals over pictures.

# %%
import pandas as pd
import xarray as xr

import mechvlm as mv

vlm = mv.load("demo")
found = mv.methods.viar.study(vlm, items=300, few=120, controls=6)

pd.Series({name: one.attrs["part_seconds"] for name, one in found.parts.items()}, name="seconds").to_frame().T

# %% [markdown]
# ## Where it looks
#
# Four numbers go by the name of visual attention. This is the plain one, the share of a text row's attention that falls
# on image tokens, with position 0 beside it: in large models position 0 is a sink, and counted as picture it makes a
# zone of its own (tutorial 9).

# %%
print(found.findings["profile"])
mv.plot.layer_spans(found["profile"], title="Attention to the image, and to position 0")

# %% [markdown]
# **Is there a zone of neglect?** Some curve always has a lowest stretch. It is chosen by half of the pictures and has
# to be below both of its neighbours in the other half. A zone that is there may still be shallow: read the scale. And
# is the curve a U? Only if bent up, and if a parabola foretells layers left out better than a straight line does.

# %%
print(found.findings["zone"])
mv.plot.zone_curve(found["zone"], title="The curve, and the layers that are chosen")

# %% [markdown]
# **Heads.** One standard deviation below the mean of all heads is neglect, one above a specialist.

# %%
print(found.findings["heads"])
mv.plot.head_matrix(found["heads"], title="Attention to the image, head by head")

# %% [markdown]
# ## Does the picture still matter?
#
# **Language-prior collapse.** How alike is what layers add for the real picture and for a null one? A cosine has no
# scale by itself, so another real picture stands beside the null ones. On the right the last layer's output is taken
# behind the final norm, which is what was published.

# %%
print(found.findings["collapse"])
mv.plot.collapse_curves(found["collapse"], "update_cosine", title="What layers add, real and null")

# %%
mv.plot.collapse_curves(found["collapse"], "state_cosine", title="What they hold, real and null")

# %% [markdown]
# **Gradients.** Gradients fall from layer to layer at any position. Those at the same image tokens of a black picture
# are the baseline; of a zone there is a sign only where the real picture's fall faster.

# %%
print(found.findings["gradients"])
spans = ["image", "question"]
mv.plot.gradient_decay(found["gradients"], spans=spans, title="The gradient of the answer, layer by layer")

# %%
mv.plot.gradient_decay(found["gradients"], "relative", spans, title="The same times the state, which has no scale")

# %% [markdown]
# ## What it answers
#
# The demo model is nearly always right, so there is little to gain, and little power to see a loss.

# %%
print(found.findings["base"])
base = found["base"]
mv.plot.reliability_diagram(
    mv.evaluate.stats.reliability(base.p_yes.values, base.label.values), title="How sure, and how right"
)

# %% [markdown]
# **Attention, and being right.** Looked at within each answer, since attention may tell a "yes" from a "no" and nothing
# else, and corrected for the number of layers.

# %%
print(found.findings["samples"])
samples = found["samples"]
if "measure" in samples.dims:
    mv.plot.association(samples, title="Attention and being right").update_xaxes(type="category").show()
    both = xr.concat([samples.right, samples.wrong], xr.Variable("answer", ["right", "wrong"])).rename("attention mass")
    mv.plot.lines(both, "measure", "answer", title="Attention on right and on wrong answers").show()

# %% [markdown]
# ## The bias
#
# +2 on the scores of image tokens in the chosen layers, in all heads. Whatever makes a model say yes more often has to
# be better than a threshold that does so: the grey curve.

# %%
print(found.findings["bias"])
compared = mv.evaluate.stats.compare(base, found["bias"])
mv.plot.comparison(compared, title="What the bias changes, and what of it a threshold does not")

# %%
mv.plot.threshold_curve(compared, title="The bias beside a moved threshold")

# %%
mv.plot.reliability_diagram(compared, title="How sure, and how right, with the bias and without")

# %% [markdown]
# **Variants.** An amount for each layer by the paper's formula and by the code's; the heads of neglect alone; and the
# bias in the pass over the prompt, in the steps behind it, or in both.

# %%
for part in ("adaptive", "head_bias", "when"):
    print(found.findings[part], end="\n\n")

# %% [markdown]
# **How much?** At each amount the accuracy stands beside that of a threshold which says yes as often.

# %%
print(found.findings["doses"])
mv.plot.dose_curves(found["doses"], title="How much bias")

# %% [markdown]
# **In which layers?** Beside each set of layers as many random ones. Without them, any layers would look chosen.

# %%
print(found.findings["layers"])
mv.plot.layer_controls(found["layers"], title="Accuracy, beside random layers")

# %%
mv.plot.layer_controls(found["layers"], "beyond", title="Above the moved threshold, beside random layers")

# %% [markdown]
# **Visual contrastive decoding**, as its authors have it: with the cut, and with the picture kept. Alone, and with the
# bias in both of its branches.

# %%
print(found.findings["contrast"])
contrast = mv.evaluate.stats.compare(base.isel(item=slice(0, 120)), found["contrast"].sel(edit="VCD"))
mv.plot.comparison(contrast, title="What visual contrastive decoding changes")

# %% [markdown]
# ## Is it more than another threshold?

# %%
print(found.findings["statistics"])
over = found["statistics"].sel(metric="accuracy", drop=True)
ahead = over.advantage.assign_attrs(long_name="accuracy above the moved threshold")
band = (over.advantage_low, over.advantage_high)
mv.plot.bars(ahead, "edit", band=band, title="Every edit, above a threshold with the same share of yes")

# %%
mv.evaluate.stats.comparison_table(compared)

# %% [markdown]
# So, of the demo model: there is a zone by the test, and it is shallow. The bias moves most of the attention that is
# left onto the picture, and the answers hardly at all; a threshold that says yes as often gets as many right, and
# random layers do as well. A black picture is no natural null: another real picture is more like the real one. What
# cannot be seen here is a small gain: with so few wrong answers, the intervals above say how much of one is possible.
#
# The same study of another model, or in the published convention, is one line:
# `mv.methods.viar.study(vlm, "POPE/coco", images="val2014", convention="viar-2026")`. With `out="folder"` each part is
# kept as soon as it is finished, and a study that was stopped goes on. What the published convention does to these
# curves is tutorial 9.
