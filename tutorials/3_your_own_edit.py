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
# # 3. Your own edit
#
# What would the model answer if it could look at one square of the picture only?
#
# No builder of mechvlm does that. An edit is an ordinary function from a tensor to a tensor, so we write it.

# %%
import torch

import mechvlm as mv

vlm = mv.load("demo")
real = vlm.prompt(mv.demo.scenes()[0].image, "Is there a 9 in the image?")

# %% [markdown]
# The attention pattern has axes `batch head query key`, and each of its rows sums to one. To let every query see
# one image token only, the weights of the others become zero and what is left is divided anew.


# %%
def spotlight(token: int):
    others = [position for position in real.image if position != token]

    def edit(pattern: torch.Tensor) -> torch.Tensor:  # batch head query key
        pattern[..., others] = 0
        return pattern / pattern.sum(-1, keepdim=True)

    return edit


# %% [markdown]
# It needs no model to be tested.

# %%
token = real.image[9]
seen = spotlight(token)(torch.rand(1, 2, len(real), len(real)))
assert torch.allclose(seen.sum(-1), torch.ones(1, 2, len(real)))
assert set(seen[..., real.image].any(dim=(0, 1, 2)).nonzero().flatten().tolist()) == {9}

# %% [markdown]
# Queries inside the image look back at tokens before them, so in the model we leave those rows as they are and edit
# only what the text sees. A bias or a cut would be handed to the attention kernel; any other edit of a pattern
# computes that layer's attention anew, in the edited rows of the batch alone. mechvlm refuses an edit that changes
# the shape, returns no number, or never acts.

# %%
text = real.question + real.last


def for_text(edit):
    def edited(pattern: torch.Tensor) -> torch.Tensor:
        new = edit(pattern.clone())
        pattern[:, :, text] = new[:, :, text]
        return pattern

    return edited


layers = range(vlm.shape.layers["text"])


def only(token: int) -> list[mv.Edit]:
    return [mv.Edit(mv.Site("pattern", layer), for_text(spotlight(token)), label="spotlight") for layer in layers]


# %% [markdown]
# One experiment for each image token: the probability of “yes” if the text may look at that token and no other.

# %%
answers = mv.sweep(vlm, real, only, mv.probability("yes"), token=real.image)
answers = answers.rename("probability of yes", token="position")
mv.plot.over_image(answers, real.images[0], real.pictures[0], title="“Is there a 9?”, seeing one token only")
