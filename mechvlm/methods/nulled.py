"""The other branch of a contrast: the same question about a picture that was drowned in noise, or another null.

Rule this module guards: noise that was published on normalised pixels is added to normalised pixels, behind the
processor, where no resizing averages it away.

>>> other = PixelDiffusion(500, seed=1).of(vlm, real)
>>> len(other) == len(real), torch.equal(other.encoding["pixel_values"], real.encoding["pixel_values"])
(True, False)
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.edits import name_of
from mechvlm.experiments.nulls import NAMED, null_prompts
from mechvlm.images import diffusion_share
from mechvlm.prompt import Prompt
from mechvlm.sites import told, whole
from mechvlm.vlm import VLM


@dataclass(frozen=True)
class PixelDiffusion:
    """Forward diffusion of what the model is given, `pixel_values`, t steps long: the noise of VCD.

    `x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`, where x_0 are the normalised pixels and `a_t` is
    `mv.images.diffusion_share(t)`. The same noise is drawn for every prompt whose pixels have the same shape.

    Attributes:
        t: the step, from 0 (hardly any noise) to 999.
        seed: of the noise, a whole number from 0.

    Raises:
        ValueError: for a step or a seed that is none.
        TypeError: for a seed that is no whole number.

    Example:
        >>> str(PixelDiffusion(500))
        'diffusion(t=500, seed=0) of pixel_values'

    Source:
        Leng et al. (2024), "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
        Decoding", section 3.2, and `vcd_add_noise.py` of its code.
    """

    t: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        diffusion_share(self.t)
        if whole("seed", self.seed) < 0:
            raise ValueError(f"seed={self.seed} is not a seed; give a whole number from 0.")

    def of(self, vlm: VLM, prompt: Prompt) -> Prompt:
        """The prompt with its pixels drowned; other words or another picture have to be asked for before.

        Raises:
            ValueError: for a prompt without a picture.
        """
        pixels = prompt.encoding.get("pixel_values")
        if pixels is None:
            raise ValueError(f"the prompt {prompt.words!r} holds no image, so there is nothing to drown in noise.")
        frames = 1 if vlm.processor is None else vlm.processor.image_processor.to_dict().get("temporal_patch_size") or 1
        share = diffusion_share(self.t)
        mixed = math.sqrt(share) * pixels + math.sqrt(1 - share) * self.noise(pixels, frames)
        if pixels.ndim > 3:  # a tile that is 0 throughout is no picture but room for one
            mixed = torch.where(pixels.flatten(-3).any(-1)[..., None, None, None], mixed, pixels)
        return replace(prompt, encoding={**prompt.encoding, "pixel_values": mixed}, again=None)

    def noise(self, pixels: Float[Tensor, "..."], frames: int = 1) -> Float[Tensor, "..."]:
        """Standard normal noise in the shape of pixels.

        Args:
            frames: how often a row of patches holds the same frame (Qwen2-VL: twice), which gets the same noise.
        """
        generator = torch.Generator().manual_seed(self.seed)
        if pixels.ndim != 2 or frames == 1:
            return torch.randn(pixels.shape, generator=generator).to(pixels)
        once = torch.randn(len(pixels), 3, 1, pixels.shape[1] // (3 * frames), generator=generator)
        return once.expand(-1, -1, frames, -1).reshape(pixels.shape).to(pixels)

    def __str__(self) -> str:
        return f"diffusion(t={self.t}, seed={self.seed}) of pixel_values"


def nulled(vlm: VLM, prompt: Prompt, null: Any) -> Prompt:
    """The prompt of the other branch.

    Args:
        null: a `PixelDiffusion`; the name of a null, as in `mv.language_prior_collapse` ("diffusion" is that of pixel
            values); a null image of `mv.images`; or a prompt, which stays as it is.

    Raises:
        ValueError: for what is no null.

    Example:
        >>> nulled(vlm, real, "no_image").image
        []
    """
    if isinstance(null, Prompt):
        return null
    if isinstance(null, PixelDiffusion):
        return null.of(vlm, prompt)
    named = null if isinstance(null, str) else {"null": null}
    return next(iter(null_prompts(vlm, [prompt], named).values()))[0]


def null_of(null: Any, usual: Any) -> Any:
    """A null as it was given, by name or not at all; only its kind is looked at.

    Args:
        usual: that which goes without saying.

    Raises:
        ValueError: for a picture of another prompt, where there is one prompt.
    """
    if isinstance(null, str) and null == "swap":
        raise ValueError("null='swap' needs prompts about several pictures; give mv.images.swap(picture).")
    if isinstance(null, str) and null == "diffusion":
        return PixelDiffusion()
    return usual if null is None else null


def null_name(null: Any) -> str:
    """How records name a null, with its settings."""
    if isinstance(null, Prompt):
        return told(null.words)
    if isinstance(null, PixelDiffusion | str):
        return name_of(NAMED[null]) if null in NAMED else str(null)
    return name_of(null)
