"""Experiments: one question a file, written with the names that every user has.

Each takes a model and prompts and returns an xarray object with named axes, whose `attrs` hold the conventions and
where the numbers came from. `to_netcdf` writes all of it.

`answers` what does it say? `profile` where does it look? `lens` what does it hold at each position? `ablation` which
heads does the answer need? `ablations` which blocks, positions and regions, over many prompts? `order`, `heads` which
sets of heads, against random ones? `tokens` which image tokens? `accuracy` is it right? `patching` where does what
was seen pass? `attribution` on which image tokens does the answer depend? `queries` where does a Q-Former look?
`collapse` do layers work otherwise with another picture? `visual_gradient` how fast does the answer stop depending on
it? `dose` what if it looked more? `sweep` any other edits, one run for each point of a grid.
"""
