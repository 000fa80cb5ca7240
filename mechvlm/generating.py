"""Ways of generating: which are refused, and how the picture is looked at.

Rule this module guards: every step of a generation is one pass over one new position, with a cache that grows by it,
since edits and readings rest on that; and the first pass is the one that `run` makes.

>>> check_sampling(20, {"do_sample": False}, model.generation_config)  # doctest: +SKIP
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from mechvlm.batch import TEXT_LIKE
from mechvlm.calls import MASKED
from mechvlm.layout import Layout
from mechvlm.run import Generation, by_step, texts_of
from mechvlm.shapes import Shape
from mechvlm.sites import told, whole

REFUSED_SAMPLING = {
    "use_cache": (True, None),
    "cache_implementation": ("dynamic", "static", None),
    "guidance_scale": (1, None),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "penalty_alpha": (0, None),
    "dola_layers": (None,),
    "prefill_chunk_size": (None,),
    "custom_generate": (None,),
    "past_key_values": (None,),
    "streamer": (None,),
}
"""Settings of a generation, and the values with which each step is one pass over one new position."""


def check_sampling(max_new_tokens: int, sampling: Mapping[str, Any], own: Any) -> None:
    """Refuse ways of generating whose steps are not one new position each, with a cache that grows by it.

    Args:
        sampling: what the user passed.
        own: the model's own generation configuration, which holds where neither the user nor his configuration does.
    """
    if whole("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} generates nothing; give 1 or more.")
    if "read" in sampling:
        raise ValueError("a generation reads at every step; write read_each_step= for read=.")
    given = {"inputs_embeds", "pixel_values", "position_ids", *TEXT_LIKE} & sampling.keys()
    if given:
        raise ValueError(f"{min(given)} comes from the prompt; change the prompt instead of passing it to generate.")
    config = sampling.get("generation_config") or own
    settings = {**config.to_dict(), **sampling}
    refused = [name for name, fine in REFUSED_SAMPLING.items() if name in settings and settings[name] not in fine]
    if refused:
        raise ValueError(
            f"generate does not take {refused[0]}={told(settings[refused[0]])}: edits and readings rest on steps of "
            "one new position, each one pass, with a cache that grows by it."
        )


def has_static_cache(shape: Shape) -> bool:
    """Whether the transformers that is installed can generate with a static cache from a model.

    Its PaliGemma cannot make the mask of one where its text is Gemma 2; before 5.18 its Mllama gave the picture's keys
    the words' places in it.
    """
    capped = shape.ahead == "prompt" and shape.score_cap is not None
    return not capped and not (shape.crosses and Version(version("transformers")) < Version("5.18"))


def check_static_cache(sampling: Mapping[str, Any], own: Any, shape: Shape, kernel: str) -> None:
    """Refuse a static cache where transformers cannot make one, or attention would not know which keys are yet to come.

    Args:
        sampling, own: as in `check_sampling`.
        kernel: the attention implementation.
    """
    settings = {**(sampling.get("generation_config") or own).to_dict(), **sampling}
    if settings.get("cache_implementation") != "static":
        return
    if kernel not in MASKED:
        raise ValueError(
            f"a static cache has room for keys to come, which {kernel} is not told to leave out; set vlm.attention = "
            "'sdpa', or leave cache_implementation='static' out."
        )
    if not has_static_cache(shape):
        raise ValueError(
            f"transformers {version('transformers')} cannot generate from this model with a static cache; leave "
            "cache_implementation='static' out."
        )


def check_copies(pictured: bool, sampling: Mapping[str, Any], own: Any) -> None:
    """Refuse several texts for a prompt where something on the picture's way to the words is read or edited."""
    settings = {**(sampling.get("generation_config") or own).to_dict(), **sampling}
    copies = [name for name in ("num_beams", "num_return_sequences") if (settings.get(name) or 1) > 1]
    if pictured and copies:
        raise ValueError(
            f"generate does not take {copies[0]}={settings[copies[0]]} together with readings or edits of image "
            "features or of what makes them: transformers copies those for each text it follows; leave it at 1."
        )


def answered(hf: Any, given: Mapping[str, Any], pictured: bool) -> Any:
    """What a model generates, looking at its picture within its first pass where something of it is read or edited.

    From 5.23 on transformers runs the vision tower before that pass, outside of the calls that `mechvlm.walk` knows,
    for models that say that they take images.
    """
    # A compiled forward pass would run past what is read and edited; transformers compiles it for static caches.
    given = {"disable_compile": True, **given}
    if not pictured:
        return hf.generate(**given)
    hf.input_modalities = ("text",)
    try:
        return hf.generate(**given)
    finally:
        del hf.input_modalities


def generation_of(processor: Any, shows: Mapping[str, Any], start: int, alone: bool, layout: Layout) -> Generation:
    """What was generated, and what was read on the way.

    Args:
        shows: token ids and readings.
        start: how many positions the prompt has.
        alone: whether one prompt was given, and not a list.
    """
    tokens = shows["tokens"][:, start:]
    return Generation(texts_of(processor, tokens, alone), tokens, by_step(shows["saved"], layout))
