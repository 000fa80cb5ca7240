"""Figures of the logit lens over layers.

Rule this module guards: a rank axis stands upside down and in powers, so that the top is at the top.

>>> lens = mv.logit_lens(vlm, real, positions=real.image, words=["7", "red"])
>>> len(words_by_layer(lens).data)
6
"""

from collections.abc import Sequence

import plotly.graph_objects as go
import xarray as xr

from mechvlm.plot.charts import lines

VALUES = {"probability": "word_probability", "rank": "word_rank"}


def words_by_layer(
    lens: xr.Dataset,
    value: str = "probability",
    positions: Sequence[int] | None = None,
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """How likely words are after each layer, or at which rank they stand: their median over positions, and quartiles.

    Args:
        lens: what `logit_lens` returned, with words.
        value: "probability", or "rank", on a logarithmic axis whose top is 1.
        positions: some of the lens's; None means all.
        caption: by default says what lines and bands are.

    Raises:
        ValueError: for a lens without words, another value, or positions that it has not.
        TypeError: for what is no lens.

    Example:
        >>> lens = mv.logit_lens(vlm, real, positions=real.image, words=["7"])
        >>> words_by_layer(lens, "rank", title="At which rank the picture's tokens hold the digit")
    """
    if not isinstance(lens, xr.Dataset):
        raise TypeError(f"words_by_layer draws what logit_lens returns, and was given a {type(lens).__name__}.")
    if value not in VALUES:
        raise ValueError(f"value={value!r} is not known; choose 'probability' or 'rank'.")
    if VALUES[value] not in lens.data_vars:
        raise ValueError("the lens holds no words; make it with logit_lens(..., words=['yes']).")
    shown = lens[VALUES[value]]
    held = shown.position.values.tolist()
    chosen = held if positions is None else list(positions)
    missing = [position for position in chosen if position not in held]
    if missing or not chosen:
        given = f"position {missing[0]}" if missing else "an empty list"
        raise ValueError(f"positions holds {given}, and the lens has {', '.join(map(str, held[:8]))} and so on.")
    here = shown.sel(position=chosen)
    median, low, high = (here.quantile(at, "position", keep_attrs=True) for at in (0.5, 0.25, 0.75))
    several = len(chosen) > 1
    said = f"The median over {len(chosen)} positions; the band holds the middle half of them." if several else ""
    figure = lines(median, "layer", "word", band=(low, high) if several else None, title=title, caption=caption or said)
    if value == "rank":
        # Plotly's own ticks between powers of ten leave the power out.
        ticks = [step * 10**power for power in range(7) for step in (1, 2, 5)]
        figure.update_yaxes(type="log", autorange="reversed", tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks])
    return figure
