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
# # 10. From laptop to NDIF
#
# A model of 72 billion parameters does not fit on a laptop, and what one asks of it does. Where a model runs is a
# property of the model: `mv.load(name)` runs it here, `mv.load(name, remote=True)` on [NDIF](https://ndif.us), and
# nothing below that line changes. This notebook runs one script twice on the demo model: here, and as if elsewhere.

# %%
import pandas as pd
import torch
import xarray as xr

import mechvlm as mv


def study(vlm):
    real = vlm.prompt(mv.demo.scenes()[0].image, "Is there a 9 in the image?")
    direction = torch.ones(vlm.shape.d_model["text"])  # some vector of one's own

    def push(stream: torch.Tensor) -> torch.Tensor:  # batch pos d_model
        stream[:, real.image] += 0.2 * direction.to(stream)
        return stream

    def strongest(pattern: torch.Tensor) -> torch.Tensor:  # batch head query key
        return pattern[:, :, -1, real.image].max(-1).values

    sites = [mv.Site("pattern", layer) for layer in range(vlm.shape.layers["text"])]
    return {
        "profile": mv.attention_profile(vlm, real).mass,
        "heads": mv.ablate_each_head(vlm, real, mv.logit_difference("yes", "no")),
        "edited": vlm.run(real, edits=[mv.Edit(mv.Site("resid_post", 2), push)]).logits,
        "reading": torch.stack([*vlm.run(real, read=dict.fromkeys(sites, strongest)).values.values()]),
        "answer": vlm.generate(real, edits=[mv.bias_attention(3, keys=real.image, amount=2.0)]).text,
    }


here = study(mv.load("demo"))

# %% [markdown]
# ## As if elsewhere
#
# `remote="local"` loads the model, and sends everything that is asked of it as it would be sent to a server: functions
# by their source, with the tensors and numbers that they hold, in bytes that are unpacked where nothing of mechvlm and
# of this notebook can be imported. What comes back is plain data. It is the way to try a script before it is sent.

# %%
vlm = mv.load("demo", remote="local")
elsewhere = study(vlm)

pd.Series(
    {
        name: "the same"
        if isinstance(one, str) and one == elsewhere[name]
        else f"{abs(one - elsewhere[name]).max():.1e}"
        for name, one in here.items()
    },
    name="largest difference",
).to_frame().T

# %% [markdown]
# A run, a profile and a generation are the same to the last bit. A sweep is the same to rounding: here it starts again
# from the edited layer, elsewhere each point is a full pass (`attrs["engine"]`), since what a sweep keeps between its
# batches would have to travel.

# %%
mv.plot.heatmap(elsewhere["heads"], title="What the answer loses without each head, computed elsewhere")

# %%
both = xr.concat([here["profile"], elsewhere["profile"]], xr.Variable("where", ["here", "elsewhere"]))
seen = both.sel(span="image").mean(["example", "head"]).rename("attention to the image")
mv.plot.lines(seen, "layer", "where", title="One line upon the other")

# %% [markdown]
# ## What travels
#
# Each run, generation or sweep is one job, and what it sends is code, positions and the encoded question: nothing that
# grows with the weights. What comes back is what was asked for. So read what you need: one row of a pattern, and not
# the map.

# %%
mv.remote.traffic(vlm)

# %%
real = vlm.prompt(mv.demo.scenes()[0].image, "Is there a 9 in the image?")
site = mv.Site("pattern", 3)
for what in (None, mv.rows([-1], keys=real.image), mv.mass(real.spans, queries=[-1])):
    vlm.run(real, read={site: what})

mv.remote.traffic(vlm).tail(3).assign(read=["the whole pattern", "one row of it", "its mass by span"])

# %% [markdown]
# ## What cannot be sent
#
# A function of yours may hold tensors, numbers, prompts, runs, and functions and classes of your own files; a probe
# (`torch.nn.Linear`) goes along with its weights. It may use torch, numpy, math and einops. Other packages are not
# there, and a decorator would be lost on the way. Both are said before anything is sent:

# %%
import scipy.stats


def spread(pattern: torch.Tensor) -> torch.Tensor:
    return torch.tensor(scipy.stats.entropy(pattern[0, :, -1].T.numpy()))


try:
    vlm.run(real, read={site: spread})
except ValueError as error:
    print(error)

# %% [markdown]
# So either write it in torch, as `mv.entropy()` is, or read less and go on here:

# %%
row = vlm.run(real, read={site: mv.rows([-1])})[site]  # batch head query key
scipy.stats.entropy(row[0, :, 0].T.numpy())

# %% [markdown]
# One thing is not said, since it is no error: a function that runs elsewhere works on copies. What it appends to a
# list of yours, or prints, stays there. Return what you want to have.

# %%
kept = []


def keep(stream: torch.Tensor) -> torch.Tensor:
    kept.append(stream.shape)
    return stream.norm(dim=-1)


norms = vlm.run(real, read={mv.Site("resid_post", 3): keep})[mv.Site("resid_post", 3)]
len(kept), norms.shape

# %% [markdown]
# ## On NDIF
#
# With a key from [login.ndif.us](https://login.ndif.us) in the environment variable `NDIF_API_KEY`, this is all that
# changes (not run here: it takes the network, and NDIF was not tried from this notebook; what is sent was tried on a
# server of its own that has nnsight and no mechvlm):
#
# ```python
# mv.remote.status()  # the models that run there now, and whether mechvlm reads them
# vlm = mv.load("Qwen/Qwen2.5-VL-72B-Instruct", remote=True)  # the processor is loaded here, the weights are not
# found = study(vlm)
# ```
#
# `remote="http://..."` is a server of your own. Before the first job its versions are compared with those here, and
# whether the model is deployed; what is wrong is said in one sentence that says what to do, as for every other
# failure: [docs/remote.md](../docs/remote.md) has the table of them. Without a server, for instance:

# %%
try:
    mv.remote.status("http://127.0.0.1:9")
except mv.remote.JobError as error:
    print(error)

# %% [markdown]
# A job is written down on this machine before it is waited for. If the connection is lost, the laptop closed or the
# script killed, run the same script again: it waits for the job that was sent, and sends nothing twice. Or collect it
# by its id:
#
# ```python
# mv.remote.jobs()  # what was sent, where, and how far it is
# mv.remote.resume("0b9f4c1e-...")  # what it saved, as plain data
# ```
#
# How long a job is waited for is said with the server: `mv.load(name, remote=mv.remote.Server(timeout=3600))`.

# %% [markdown]
# ## Between a laptop and NDIF
#
# **Several GPUs, or too little memory.** `mv.load(name, device_map="auto")` spreads the layers over the GPUs there
# are, and keeps in memory or on disk what finds no room; `quantization_config=` packs weights into 8 or 4 bits. The
# script stays as it is, and results are where they were made.
#
# **Many prompts.** With `out="folder"` the same script shares its work among processes, under `accelerate launch` or,
# with `mv.workers.Pool`, on Ray; one that dies is replaced and costs what it was at
# ([docs/workers.md](../docs/workers.md)).
#
# ```python
# vlm = mv.load("Qwen/Qwen2.5-VL-72B-Instruct", device_map="auto")
# found = mv.evaluate.pope(mv.load("llava-hf/llava-1.5-7b-hf"), "coco_pope_adversarial.json", "val2014", out="answers")
# ```
