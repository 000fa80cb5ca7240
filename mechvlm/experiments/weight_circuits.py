"""Which heads read what which heads write, and what a head would say of a direction: from the weights alone.

Rule this module guards: a score is of the matrices, so it says what could pass from head to head, and not what does in
any run; `direct_logit_attribution`, patching and ablation say that.

>>> found = composition_scores(vlm, layers=[0, 1, 2])
>>> found.v.dims, bool(found.v.sel(writer_layer=2, reader_layer=1).isnull().all())
(('writer_layer', 'writer_head', 'reader_layer', 'reader_head'), True)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.experiments.folded import factors
from mechvlm.experiments.record import chosen_layers
from mechvlm.experiments.sight import named, own_layers
from mechvlm.experiments.sweep import numbers
from mechvlm.vlm import VLM
from mechvlm.writes import Writing, writing

WAYS = ("q", "k", "v")


def composition_scores(vlm: VLM, layers: Sequence[int] | None = None, subtract: bool = False) -> xr.Dataset:
    """How much of what one head writes the queries, keys or values of a later head could read, for all pairs of heads.

    The score is the Frobenius norm of the product of the two heads' circuits over the product of their norms: 0 where
    the later head reads nothing that the earlier one writes, at most 1. With OV the first head's circuit, `x W_V W_O`
    for a stream x (a row), and QK = W_Q W_K^T the second's: q is |OV QK| / (|OV| |QK|), k is |OV QK^T| / (|OV| |QK|),
    and v |OV OV'| / (|OV| |OV'|) with the second's OV'.

    Args:
        layers: by default all whose words attend to each other; those that attend to the picture's keys instead are
            left out.
        subtract: whether the value that matrices of independent normal numbers have is taken away. For any ranks the
            expected square of the product's norm is the product of the circuits' expected squared norms over d_model,
            so that value is 1 / sqrt(d_model); `attrs` say it. Trained matrices are not such, and a score above it is
            no test.

    Returns:
        `q`, `k` and `v` over writer_layer, writer_head, reader_layer and reader_head (query heads; those that share
        keys and values have them in common), without unit. Not a number unless the writer's layer is before the
        reader's. The gain of the norm that a head reads through, those of its queries and keys, and that of a norm
        behind its output are folded in. Biases, scales and rotary embedding are not: q and k are for a query and a key
        at the same place.

    Raises:
        ValueError: for layers that are not there, given twice, or attend to the picture's keys.

    Example:
        >>> found = mv.composition_scores(vlm, layers=[0, 1])
        >>> mv.plot.heatmap(found.v.sel(writer_layer=0, reader_layer=1, drop=True))

    Source:
        Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", on composition; its rows and columns
        are exchanged here. There random matrices are drawn for what is subtracted.
    """
    chosen = _layers(vlm, layers)
    tables = vlm.place.ask(vlm.model, composed, vlm, writing(vlm), chosen)
    expected = vlm.shape.d_model["text"] ** -0.5
    heads = range(vlm.shape.heads["text"])
    found = {}
    for way in WAYS:
        table = np.full((len(chosen), len(heads), len(chosen), len(heads)), np.nan)
        for (first, then), scores in tables[way]:
            table[chosen.index(first), :, chosen.index(then)] = numbers(scores) - (expected if subtract else 0.0)
        about = {"long_name": f"{way}-composition{' above random matrices' if subtract else ''}", "units": "1"}
        found[way] = (("writer_layer", "writer_head", "reader_layer", "reader_head"), table, about)
    coordinates = {
        f"{who}_{what}": of for who in ("writer", "reader") for what, of in (("layer", chosen), ("head", heads))
    }
    said = {"model": vlm.name, "random_matrices": expected, "subtracted": int(subtract), "layers": "counted from 0"}
    return xr.Dataset(found, coords=coordinates, attrs=said)


def composed(_model: Any, reader: Any, how: Writing, layers: Sequence[int]) -> dict[str, list[tuple]]:
    """The scores of all pairs of layers, worked out where the weights are.

    Returns:
        For each way to compose, pairs of layers (writer, reader) with a table `writer reader` of heads.
    """
    own = {layer: circuits(factors(reader, how, layer)) for layer in layers}
    found: dict[str, list[tuple]] = {way: [] for way in WAYS}
    for first in layers:
        for then in [layer for layer in layers if layer > first]:
            for way in WAYS:
                found[way].append(((first, then), score(own[first], own[then], way)))
    return found


def circuits(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a layer's scores are made of: its matrices, one for each query head, and small ones of the same lengths.

    Returns:
        `q`, `k`, `v`, `head d_model d_head`, and `o`, `head d_head d_model`; triangles R with R^T R = X^T X for each,
        `rq`, `rk`, `rv`, and for o transposed `ro`, `head d_head d_head`; and the norms `qk` and `ov`, `head`.
    """
    count = held["q"].shape[0]
    wide = {name: x.repeat_interleave(count // x.shape[0], 0) for name, x in held.items()}
    tall = {"q": wide["q"], "k": wide["k"], "v": wide["v"], "o": wide["o"].transpose(1, 2)}
    wide |= {f"r{name}": torch.linalg.qr(x.double(), mode="r").R.to(x) for name, x in tall.items()}
    wide["qk"] = (wide["rq"] @ wide["rk"].transpose(1, 2)).norm(dim=(1, 2))
    wide["ov"] = (wide["rv"] @ wide["ro"].transpose(1, 2)).norm(dim=(1, 2))
    return wide


def score(first: dict[str, Tensor], then: dict[str, Tensor], way: str) -> Float[Tensor, "writer reader"]:
    """The scores of two layers' heads, from factors: |V O X Y^T| is |R_V (O X) R_Y^T|, of d_head by d_head."""
    other, norm = {"q": ("rk", "qk"), "k": ("rq", "qk"), "v": ("ro", "ov")}[way]
    read = then[way].to(first["o"])
    middle = torch.einsum("hid,gdj->hgij", first["o"], read)
    product = first["rv"][:, None] @ middle @ then[other].to(first["o"]).transpose(1, 2)[None]
    lengths = first["ov"][:, None] * then[norm].to(first["o"])[None]
    return torch.where(lengths > 0, product.norm(dim=(2, 3)) / lengths, torch.zeros_like(lengths))


def _layers(vlm: VLM, layers: Sequence[int] | None) -> list[int]:
    """Layers whose heads have circuits between one stream and another."""
    own = own_layers(vlm)
    chosen = own if layers is None else chosen_layers(vlm, layers)
    count = vlm.shape.layers["text"]
    beyond = [layer for layer in chosen if not 0 <= layer < count]
    if beyond:
        raise ValueError(f"the text tower has {count} layers, counted from 0, so there is no layer {beyond[0]}.")
    across = [layer for layer in chosen if layer not in own]
    if across:
        raise ValueError(
            f"in {named(across)} of this model keys and values are those of the picture, and not of the residual "
            f"stream; choose from {named(own)}."
        )
    if len(chosen) < 2:
        raise ValueError(f"{named(chosen)} alone has no later layer to compose with; give two layers or more.")
    return sorted(chosen)
