"""What is lost where one image token is taken away? Each by itself, by exact runs: what gradients only estimate.

>>> occlusion(vlm, real, yes).attribution.idxmax().item()
15.0
"""

from typing import Any

import numpy as np
import xarray as xr

from mechvlm.experiments.inputs import token_coordinates, token_dim
from mechvlm.experiments.record import metric_name, metric_unit, one_prompt, record
from mechvlm.experiments.removal import Tokens, nothing_to_see, removable, removed
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.rounds import done
from mechvlm.sites import whole
from mechvlm.vlm import VLM


def occlusion(
    vlm: VLM,
    prompt: Prompt,
    metric: Metric,
    null: Any = None,
    at: str = "image_features",
    block: int = 1,
    batch_size: int | None = None,
) -> xr.Dataset:
    """How much lower a metric is with each image token taken away by itself, by one run a token.

    This is exact for one token, and no more than that: where two tokens say the same, neither is missed.

    Args:
        null: whose features, or pixels, take the place, as in `deletion_curve`; by default a black picture.
        at: "image_features", where the picture enters the language model, or "pixels", the token's square in the
            picture itself.
        block: tokens of so many rows and columns of a tile are taken away together, and what is lost is shared equally
            among them; a block of 2 takes a quarter of the runs.
        batch_size: runs in one forward pass; see `sweep`.

    Returns:
        `attribution`, the metric of the prompt minus the metric without the token, in the metric's unit: positive where
        the token speaks for it. Over axis position, image tokens only, with image, tile, row and column as further
        coordinates, -1 for what stands for no place, which is a block of its own. The axis is `key` under
        cross-attention (Mllama), and `patch` for the pixels under a Q-Former. A token that no pixel belongs to has 0 at
        the pixels. In `attrs`: `value` of the prompt and `null_value` of the null prompt; the sum of the attributions
        is not their difference, since tokens share what they say.

    Raises:
        ValueError: for a prompt without an image, another place, a block of less than one, another null question, or,
            at the pixels, a prompt without its picture.
        TypeError: for several prompts.

    Example:
        >>> found = mv.occlusion(vlm, real, mv.logit_difference("yes", "no"), block=2)
        >>> mv.plot.over_image(found.attribution, real.images[0], real.pictures[0])

    Source:
        Zeiler and Fergus (2014), "Visualizing and Understanding Convolutional Networks", section 4.2; its grey square
        is a token here, which becomes that of the null picture.
    """
    held, other = removable(one_prompt(prompt), at), nothing_to_see(prompt, null)
    coordinates = token_coordinates(prompt, at)
    blocks = _blocks(coordinates, held, whole("block", block))
    sets = [held[:0], *blocks, held]
    values, how = done(vlm, removed(vlm, prompt, other, sets, metric, at, batch_size))
    lost = np.zeros(len(np.ravel(coordinates["row"][1])))  # type: ignore[index]
    for tokens, value in zip(blocks, values[1:-1], strict=True):
        lost[tokens] = (values[0] - value) / len(tokens)
    said = {"long_name": f"{metric_name(metric)} lost without the token", "units": metric_unit(metric)}
    ends = {"value": float(values[0]), "null_value": float(values[-1])}
    attrs = record(vlm, [prompt], metric, **ends, null_text=other.text, taken_at=at, block=block, engine=how)
    return xr.Dataset({"attribution": ([token_dim(prompt, at)], lost, said)}, coords=coordinates, attrs=attrs)


def _blocks(coordinates: Any, held: Tokens, block: int) -> list[np.ndarray]:
    """Tokens that are taken away together."""
    if block < 1:
        raise ValueError(f"block={block} takes nothing away; give 1, or more rows and columns together.")
    image, tile, row, column = (np.asarray(coordinates[name][1]) for name in ("image", "tile", "row", "column"))
    together: dict[tuple[int, ...], list[int]] = {}
    for token in held.tolist():
        nowhere = row[token] < 0
        cell = (-1, token) if nowhere else (row[token] // block, column[token] // block)
        together.setdefault((int(image[token]), int(tile[token]), *map(int, cell)), []).append(token)
    return [np.array(tokens) for tokens in together.values()]
