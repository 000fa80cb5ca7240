"""On which image tokens does the answer depend? Gradient times input, where the picture enters the language model.

>>> gradient_attribution(vlm, real, mv.logit_difference("yes", "no")).attribution.idxmax().item()
7.0
"""

import torch
import xarray as xr

from mechvlm.experiments.record import metric_unit, one_prompt, record
from mechvlm.experiments.sight import deepstack_layers, image_coordinates, image_dim
from mechvlm.experiments.sweep import numbers
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.sites import Site
from mechvlm.vlm import VLM


def gradient_attribution(vlm: VLM, prompt: Prompt, metric: Metric) -> xr.Dataset:
    """How much each image token speaks for a metric, to first order.

    Returns:
        `attribution`, the gradient of the metric at the image features times the features, summed over `d_model`, in
        the metric's unit: positive where a token, scaled up, would raise the metric. The sum over tokens is not the
        metric, since the model is not linear. `gradient_norm`, the length of the gradient, has no sign. Both over axis
        position, image tokens only, with image, tile, row and column as further coordinates, -1 for what stands for no
        place.

        Where the picture enters the language model otherwise, that is what is taken: the keys of cross-attention, with
        axis `key` instead of position (Mllama); or a Q-Former's queries, none of which stands for a place. Where
        features are also added to the image tokens behind later layers (Qwen3-VL), each token's are all taken
        together.

    Raises:
        ValueError: for a prompt without an image.
        TypeError: for several prompts.

    Example:
        >>> found = mv.gradient_attribution(vlm, real, mv.logit_difference("yes", "no"))
        >>> mv.plot.over_image(found.attribution, real.images[0], real.pictures[0])

    Source:
        Simonyan et al. (2014), "Deep Inside Convolutional Networks", section 3; times the input: Shrikumar et al.
        (2016), "Not Just a Black Box".
    """
    sites = [Site("image_features"), *[Site("deepstack", layer) for layer in deepstack_layers(vlm)]]
    run = vlm.run(one_prompt(prompt), read=sites, grad_of=metric)
    # One row a token: what enters with the words, and beside it what is added to it later.
    features = torch.cat([run[site].double().flatten(0, 1) for site in sites], -1)
    gradient = torch.cat([run.grad[site].double().flatten(0, 1) for site in sites], -1)
    unit, dim = metric_unit(metric), image_dim(prompt)
    return xr.Dataset(
        {
            "attribution": (
                [dim],
                numbers((gradient * features).sum(-1)),
                {"long_name": "gradient x input", "units": unit},
            ),
            "gradient_norm": (
                [dim],
                numbers(gradient.norm(dim=-1)),
                {"long_name": "norm of the gradient", "units": f"{unit} per unit of the feature"},
            ),
        },
        coords=image_coordinates(prompt),
        attrs=record(
            vlm,
            [prompt],
            metric,
            value=float(run.metric[0]) if run.metric is not None else float("nan"),
            taken_at=", ".join(map(str, sites)),
        ),
    )
