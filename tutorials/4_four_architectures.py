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
# # 4. One question, four architectures
#
# LLaVA gives an image one square of tokens, LLaVA-NeXT an overview and tiles, InstructBLIP 32 queries of a
# Q-Former, and Qwen2-VL a grid that follows the image's own size. The script below is the same for all four: where
# image tokens are, and what each looks at, is computed from what the model's processor returned.
#
# With `real=True` it loads the published models (7 billion weights each). By default it takes tiny random stand-ins
# of the same architectures from the tests, so its figures show how to read such models, and nothing about them.

# %%
import sys
from pathlib import Path

import xarray as xr

import mechvlm as mv

MODELS = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_next-mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "instructblip": "Salesforce/instructblip-vicuna-7b",
    "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
}
QUESTION = "is there a red dog in the image ?"
picture = mv.demo.scenes()[0].image.resize((60, 40))


def ask(stand_in: str, name: str, real: bool = False) -> tuple[mv.VLM, mv.Prompt]:
    """A model and the question to it: the published one, or its stand-in from the tests."""
    if real:
        vlm = mv.load(name, attn_implementation="sdpa")
        return vlm, vlm.prompt(picture, QUESTION)
    sys.path.insert(0, str(Path("../tests").resolve()))  # this notebook runs in the folder tutorials
    import zoo

    vlm = zoo.build(stand_in)
    return vlm, zoo.ask(vlm, picture, QUESTION)


asked = {stand_in: ask(stand_in, name) for stand_in, name in MODELS.items()}
for vlm, _ in asked.values():
    print(vlm)

# %% [markdown]
# **Which position is what.** The spans have the same names everywhere. A Q-Former's image tokens are its queries, which
# stand for no place; the others know their squares. LLaVA-NeXT's row ends are image tokens without a place.

# %%
for stand_in, (_, prompt) in asked.items():
    image = prompt.images[0]
    print(f"{stand_in:20} {prompt}")
    print(f"{'':20} {image}; row ends and the like: {len(image.separators)}")

# %% [markdown]
# **Where the last position looks**, as attention mass by span and layer, averaged over heads. Mass depends on how many
# tokens a span has, which differs by architecture; `lift` divides by that.

# %%
profiles = {name: mv.attention_profile(vlm, prompt) for name, (vlm, prompt) in asked.items()}
mass = xr.concat(
    [one.mass.mean(["example", "head"]).assign_coords(model=name) for name, one in profiles.items()],
    "model",
    coords="minimal",
    join="outer",
)
on_image = mass.sel(span="image").assign_attrs(long_name="attention mass on the image", units="fraction")
mv.plot.lines(on_image, x="layer", colour="model", title="How much of its attention the last position gives the image")

# %%
lift = xr.concat(
    [one.lift.mean(["example", "head"]).assign_coords(model=name) for name, one in profiles.items()],
    "model",
    coords="minimal",
    join="outer",
)
lift.mean("layer").to_pandas().round(2)

# %% [markdown]
# **On the picture.** Where the tokens of an image overlap (LLaVA-NeXT's overview and tiles), each layer of them gets
# its own copy of the picture.

# %%
vlm, prompt = asked["llava_next-mistral"]
seen = mv.attention_map(vlm, prompt, layer=1)
mv.plot.over_image(seen, prompt.images[0], picture, title="LLaVA-NeXT, layer 1: the last position's attention")

# %% [markdown]
# **Through the queries.** InstructBLIP's queries look at the picture themselves, in the Q-Former's cross-attention.
# Attention to a query and the query's attention to squares can be multiplied. That is a composition of two
# attentions, and not attention of the language model to the squares, so nothing does it unasked.

# %%
vlm, prompt = asked["instructblip"]
looks = mv.queries_to_patches(vlm, prompt)
to_queries = mv.rows([-1])(vlm.run(prompt, read=["text.1.pattern"])["text.1.pattern"])[0, :, 0].mean(0)
through = mv.compose_queries(to_queries[prompt.image].tolist(), looks)
mv.plot.over_image(through, prompt.images[0], picture, title="InstructBLIP, layer 1: through the queries")
