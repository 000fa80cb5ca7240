"""On which image tokens does the answer depend? Gradient times input, where the picture enters the language model.

>>> gradient_attribution(vlm, real, mv.logit_difference("yes", "no")).attribution.idxmax().item()
7.0
"""

import xarray as xr

from mechvlm.experiments.saliency import input_times_gradient
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.vlm import VLM


def gradient_attribution(vlm: VLM, prompt: Prompt, metric: Metric) -> xr.Dataset:
    """How much each image token speaks for a metric, to first order.

    Returns:
        `attribution`, the gradient of the metric at the image features times the features, summed over `d_model`, in
        the metric's unit: positive where a token, scaled up, would raise the metric. The sum over tokens is not the
        metric, since the model is not linear: where the metric hardly changes near the picture, because it is
        saturated, a token that it rests on can have next to none. `integrated_gradients` takes the whole way from a
        picture without anything to see, and `deletion_curve` tells whether a map points at what matters.
        `gradient_norm`, the length of the gradient, has no sign. Both over axis position, image tokens only, with
        image, tile, row and column as further coordinates, -1 for what stands for no place.

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
    return input_times_gradient(vlm, prompt, metric)
