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
# # 1. Read and edit
#
# Which head brings what is in the picture to the word that asks for it, and what happens without that head?
#
# `mv.load("demo")` is a small model that comes with mechvlm. It was trained on scenes of coloured handwritten
# digits. Any LLaVA checkpoint takes its place: `mv.load("llava-hf/llava-1.5-7b-hf")`.

# %%
import mechvlm as mv

vlm = mv.load("demo")
scene = mv.demo.scenes()[0]
real = vlm.prompt(scene.image, "Is there a 9 in the image?")
null = real.with_image(mv.images.black)  # the same words at the same positions, and no picture
real

# %% [markdown]
# A prompt knows which position is what. Where is each image token in the picture?

# %%
mv.plot.token_grid(real, title="Each square is one image token")

# %% [markdown]
# **Read.** A run keeps what it is asked to keep. A site is an address in the model, and with a function beside it
# only what the function returns leaves the run. Here: how much of its attention the word “9” pays to the image, in
# every head of layer 0.

# %%
site, word = mv.Site("pattern", 0), real.find("9")
run = vlm.run(real, read={site: mv.mass({"image": real.image}, queries=word)})
on_image = run[site][0, :, 0, 0]  # batch head query span
[round(share, 2) for share in on_image.tolist()]

# %% [markdown]
# Looking is not yet mattering. **Edit**: take each head out in turn. `variants` are lists of edits, one for each
# row, so that eight experiments are one forward pass. The metric is the logit of “yes” minus that of “no”.

# %%
yes = vlm.metric(mv.logit_difference("yes", "no"))
variants = [[mv.ablate_heads(0, [head])] for head in range(8)]
effect = yes(vlm.run(real, variants=variants).logits) - yes(vlm.run(real).logits)
head = int(effect.argmin())
head, [round(change, 1) for change in effect.tolist()]

# %% [markdown]
# One head matters far more than the others. What does it look at from the word “9”?

# %%
looks = mv.attention_map(vlm, real, layer=0, head=head, query=word[0])
mv.plot.over_image(looks, real.images[0], real.pictures[0], title=f"Layer 0, head {head}, from the word “9”")

# %% [markdown]
# If this head carries the picture to the question, then giving the *black* picture's run this one head's output
# from the *real* picture's run should move the answer, and giving the real run the black one's should undo it.

# %%
z = mv.Site("z", 0)  # what each head took in, batch pos head d_head
seen, unseen = vlm.run(real, read=[z])[z], vlm.run(null, read=[z])[z]
runs = {
    "picture": vlm.run(real),
    "picture, head off": vlm.run(real, edits=[mv.ablate_heads(0, [head], to=unseen)]),
    "black": vlm.run(null),
    "black, head on": vlm.run(null, edits=[mv.ablate_heads(0, [head], to=seen)]),
}
{name: round(float(yes(one.logits)[0]), 2) for name, one in runs.items()}

# %%
import xarray as xr

chance = vlm.metric(mv.probability("yes"))
bars = xr.DataArray(
    [float(chance(one.logits)[0]) for one in runs.values()], {"run": list(runs)}, name="probability of yes"
)
mv.plot.bars(bars, x="run", title=f"One head of 64 carries the answer: layer 0, head {head}")
