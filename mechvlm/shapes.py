"""One loaded model's parts and sizes, from its configuration and the tables of `mechvlm.archs` and `mechvlm.towers`.

Rule this module guards: what the configuration alone can tell to be unreadable is refused before any weight is loaded.

>>> shape_of(vlm.hf.config).layers
{'text': 8, 'vision': 5}
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from mechvlm.archs import ARCHS, Arch
from mechvlm.refusals import ENCODER_DECODER, REFUSED, WORDS_ONLY
from mechvlm.towers import TOWER_TYPES, Block, Tower

LAYERS = ("num_hidden_layers", "depth")
HEADS = ("num_attention_heads", "num_heads", "attention_heads")
"""What configurations call the numbers of a tower's layers and heads."""

installed = cache(version)
"""The version of a package: looked up once, since each look takes milliseconds and every result names four."""


@dataclass(frozen=True)
class Stack:
    """The layers of one tower: where each is, and what its parts are called.

    Attributes:
        path: where the tower is.
        layers: for each layer the path of its list and its place in it.
        blocks: for each layer its parts.
        embed: path of the module that makes the vectors that enter; None where no module does.
        packed, flat: as in `Tower`.
    """

    path: str
    layers: tuple[tuple[str, int], ...]
    blocks: tuple[Block, ...]
    embed: str | None
    packed: bool = False
    flat: bool = False


@dataclass(frozen=True)
class Parts:
    """Where one model keeps its parts.

    Attributes:
        row: its architecture's row.
        stacks: its towers, by name.
        norm: path of the final norm of the language model.
        grid: the module of `mechvlm.grids` that knows how images are laid out.
        deepstack: the vision layers behind which the modules of `row.deepstack` read, in order.
    """

    row: Arch
    stacks: dict[str, Stack]
    norm: str
    grid: str
    deepstack: tuple[int, ...] = ()

    @property
    def text(self) -> Stack:
        """The language model."""
        return self.stacks["text"]

    @property
    def vision(self) -> Stack:
        """The vision tower."""
        return self.stacks["vision"]

    @property
    def unembed(self) -> str:
        """Path of the module that makes logits."""
        return self.row.unembed


@dataclass(frozen=True)
class Shape:
    """The sizes of one loaded model, read from its configuration.

    Attributes:
        layers, heads, kv_heads, d_head, d_model: per tower.
        kinds: per tower and layer, which sites it has, in forward order.
        live: per tower, how many layers can still reach the answer. LLaVA takes its image features before the last
            layer of its vision tower, which therefore changes nothing.
        packed: towers in which all images of a batch stand in one sequence.
        ahead: which words see what stands behind them; see `Arch`.
        image_token: the id that stands for an image token in `input_ids`.
        vocabulary: number of words.
        longest: number of positions the model was built for.
        logit_cap: the logits c tanh(x / c) are made of the unembedding's x; None where they are x.
        score_cap: the same for attention scores of the text tower.
        deepstack: how many text layers image features are added behind.
        embeds_vision: whether a module makes the vectors that enter the vision tower.
        several: whether the image features are made of several layers of the vision tower.
        shares: whether rows of a batch can share one computation of the image features.
    """

    layers: dict[str, int]
    heads: dict[str, int]
    kv_heads: dict[str, int]
    d_head: dict[str, int]
    d_model: dict[str, int]
    kinds: dict[str, tuple[tuple[str, ...], ...]]
    live: dict[str, int]
    packed: tuple[str, ...]
    ahead: str
    image_token: int
    vocabulary: int
    longest: int
    logit_cap: float | None = None
    score_cap: float | None = None
    deepstack: int = 0
    embeds_vision: bool = True
    several: bool = False
    shares: bool = True

    @property
    def crosses(self) -> bool:
        """Whether layers of the text tower attend to the image's features."""
        return any("cross_z" in kinds for kinds in self.kinds["text"])


def configs_of(config: Any) -> dict[str, Any]:
    """The configuration of each tower."""
    found = {"text": config.get_text_config(), "vision": config.vision_config}
    return {**found, "qformer": config.qformer_config} if ARCHS[config.model_type].qformer else found


def kernels_of(config: Any) -> dict[str, str]:
    """The attention implementation of each tower."""
    return {tower: one._attn_implementation for tower, one in configs_of(config).items()}


def set_kernels(hf_model: Any, kernels: dict[str, str]) -> None:
    """Set the attention implementation of each tower."""
    hf_model.set_attn_implementation({f"{tower}_config": kernel for tower, kernel in kernels.items()})


def parts_of(config: Any) -> Parts:
    """Where a model of this configuration keeps its parts.

    Raises:
        ValueError: for a type of model, or of tower, that has no row.
    """
    check_known(config)
    row = ARCHS[config.model_type]
    towers = {"text": row.text, "vision": row.vision} | ({"qformer": row.qformer} if row.qformer else {})
    stacks = {}
    types = {tower: type_of(config, tower) for tower in towers}
    for name, one in configs_of(config).items():
        if types[name] not in TOWER_TYPES:
            raise ValueError(
                f"this {config.model_type} model has a {types[name]!r} as its {name} tower, which mechvlm does not "
                "know yet; adding one is a row of TOWER_TYPES in mechvlm/towers.py."
            )
        stacks[name] = stack(towers[name], TOWER_TYPES[types[name]], one)
    norm = f"{row.text}.{TOWER_TYPES[types['text']].norm}"
    taps = tuple(config.vision_config.deepstack_visual_indexes) if row.deepstack else ()
    grid = TOWER_TYPES[types["vision"]].grid or row.grid
    return Parts(row, stacks, norm, grid, taps)


def type_of(config: Any, tower: str) -> str:
    """The type of a tower; some releases of transformers leave Ovis2's vision tower without."""
    return configs_of(config)[tower].model_type or f"{config.model_type}_{tower}"


def number_of(config: Any, *names: str) -> int:
    """A number of a tower's configuration, by the first of its names that is there; releases of transformers differ."""
    settings = config.to_dict()
    return next(settings[name] for name in names if settings.get(name) is not None)


def stack(path: str, tower: Tower, config: Any) -> Stack:
    """The layers of one tower."""
    lists = [(tower.layers, number_of(config, *LAYERS), tower.block)]
    lists += [(where, number_of(config, count), block) for where, count, block in tower.more]
    crossing = set(tower.crosses(config))
    layers: list[tuple[str, int]] = []
    blocks: list[Block] = []
    for where, count, block in lists:
        for index in range(count):
            layers.append((f"{path}.{where}", index))
            blocks.append(tower.crossing if tower.crossing and len(blocks) in crossing else block)
    embed = None if tower.embed is None else f"{path}.{tower.embed}"
    return Stack(path, tuple(layers), tuple(blocks), embed, tower.packed, tower.flat)


def shape_of(config: Any) -> Shape:
    """The sizes of a model, from its configuration.

    Raises:
        ValueError: for settings of the architecture that mechvlm does not read right yet.
    """
    parts, configs = parts_of(config), configs_of(config)
    check_settings(config)
    settings = {tower: one.to_dict() for tower, one in configs.items()}
    heads = {tower: number_of(one, *HEADS) for tower, one in configs.items()}
    width = {tower: number_of(one, "embed_dim", "hidden_size") for tower, one in configs.items()}
    layers = {tower: len(one.layers) for tower, one in parts.stacks.items()}
    taps = len(parts.deepstack)
    kinds = {
        tower: tuple(
            block.kinds + (("deepstack",) if tower == "text" and index < taps else ())
            for index, block in enumerate(one.blocks)
        )
        for tower, one in parts.stacks.items()
    }
    text = settings["text"]
    return Shape(
        layers=layers,
        heads=heads,
        kv_heads={tower: one.get("num_key_value_heads") or heads[tower] for tower, one in settings.items()},
        d_head={tower: one.get("head_dim") or width[tower] // heads[tower] for tower, one in settings.items()},
        d_model=width,
        kinds=kinds,
        live={**layers, "vision": live_layers(config, layers["vision"])},
        packed=tuple(tower for tower, one in parts.stacks.items() if one.packed),
        ahead=parts.row.ahead,
        image_token=config.image_token_id,
        vocabulary=text["vocab_size"],
        longest=text["max_position_embeddings"],
        logit_cap=text.get("final_logit_softcapping") if caps_logits(parts.row) else None,
        score_cap=text.get("attn_logit_softcapping"),
        deepstack=taps,
        embeds_vision=parts.vision.embed is not None,
        several=taps > 0 or len(parts.row.taken(config)) > 1 or "intermediate_layers_indices" in settings["vision"],
        shares=parts.row.shares,
    )


def caps_logits(row: Arch) -> bool:
    """Whether the installed transformers caps this architecture's logits."""
    return bool(row.caps_logits) and Version(installed("transformers")) >= Version(row.caps_logits)


def live_layers(config: Any, layers: int) -> int:
    """How many layers of the vision tower the image features are taken behind."""
    taken = ARCHS[config.model_type].taken(config)
    behind = [number if number >= 0 else layers + 1 + number for number in taken]
    return max(behind, default=layers)


def check_known(config: Any) -> None:
    """Refuse a type of model that has no row, or whose language model is no decoder.

    Raises:
        ValueError: with the reason, where there is one.
    """
    kind, known = config.model_type, ", ".join(sorted(ARCHS))
    if kind in ARCHS:
        text = config.get_text_config()
        if text.is_encoder_decoder:
            raise ValueError(
                f"mechvlm does not read {kind!r} models whose language model is a {text.model_type!r}: "
                f"{ENCODER_DECODER}; take one with a decoder."
            )
        return
    settings = config.to_dict()
    reason = REFUSED.get(kind)
    if reason is None and settings.get("is_encoder_decoder"):
        reason = ENCODER_DECODER
    if reason is None and "vision_config" not in settings:
        reason = WORDS_ONLY
    if reason is not None:
        raise ValueError(f"mechvlm does not read {kind!r} models: {reason}; it knows {known}.")
    raise ValueError(
        f"mechvlm does not know {kind!r} models yet; it knows {known}. Adding one is a row in mechvlm/archs.py."
    )


def check_settings(config: Any) -> None:
    """Refuse settings that mechvlm does not read right, or that no model could have.

    Raises:
        ValueError: with what is wrong and what is read.
    """
    settings, vision = config.to_dict(), config.vision_config.to_dict()
    strategy = settings.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ValueError(
            f"vision_feature_select_strategy is {strategy!r}; it must be 'default' (without the class token) or 'full'."
        )
    layers = number_of(config.vision_config, *LAYERS)
    held = {**settings, **settings.get("adapter_config", {})}
    named = held.get("vision_feature_layers", held.get("vision_feature_layer"))
    for taken in ARCHS[config.model_type].taken(config):
        if not -layers <= taken <= layers:
            raise ValueError(
                f"vision_feature_layer is {named}, and the vision tower has {layers} layers; the configuration does "
                "not fit."
            )
    text = config.get_text_config().to_dict()
    if (
        text.get("do_layer_norm_before") is False
        or text.get("word_embed_proj_dim", text["hidden_size"]) != text["hidden_size"]
    ):
        raise ValueError(
            "this model's OPT has norms behind the sums (do_layer_norm_before=False) or embeddings of another width "
            "(word_embed_proj_dim), as OPT-350m has; mechvlm reads the others, OPT-2.7b and OPT-6.7b among them."
        )
    if text.get("norm_after"):
        raise ValueError(
            "this model's norms stand behind attention and MLP (norm_after=True); mechvlm reads those before them, as "
            "in Molmo2-4B and Molmo2-8B."
        )
    patch, side = vision.get("patch_size"), vision.get("image_size")
    if isinstance(patch, int) and isinstance(side, int) and not 0 < patch <= side:
        raise ValueError(f"patch_size is {patch} and image_size {side}; the configuration does not fit.")
