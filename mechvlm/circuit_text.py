"""Circuits as text: JSON to keep them in, an edge a line, and what a notebook shows.

Rule this module guards: what is written says which version wrote it, and what is read is looked through before it is
believed.

>>> as_json({"edges": [("image", "logits", None, 0.5)], "metric": "yes"}).splitlines()[-3]
'    ["image", "logits", null, 0.5]'
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

FORMAT, VERSION = "mechvlm circuit", 1
SHOWN = 12
"""Edges or nodes that a notebook shows."""


def as_json(fields: Mapping[str, Any]) -> str:
    """A circuit's fields as JSON; a score that is no number is null.

    Args:
        fields: `edges` as writer, reader, span and score.
    """
    head = {"format": FORMAT, "version": VERSION, **{name: x for name, x in fields.items() if name != "edges"}}
    lines = [f'  "{name}": {json.dumps(x)},' for name, x in head.items()]
    edges = [json.dumps([*ends, score if math.isfinite(score) else None]) for *ends, score in fields["edges"]]
    joined = ",\n    ".join(edges)
    return "\n".join(["{", *lines, '  "edges": [' + (f"\n    {joined}\n  " if edges else "") + "]", "}"]) + "\n"


def from_json(text: str, name: str, fields: Collection[str]) -> dict[str, Any]:
    """The fields that `as_json` wrote.

    Args:
        name: of the file, for what is refused.
        fields: that there may be.

    Raises:
        ValueError: for other text, or that of a later version.
    """
    try:
        held = json.loads(text)
    except json.JSONDecodeError:
        held = None
    version = held.pop("version", None) if isinstance(held, dict) and held.pop("format", None) == FORMAT else None
    if version is not None and version != VERSION:
        raise ValueError(f"{name} holds a circuit of version {version}, and this is {VERSION}; update mechvlm.")
    if version is None or "edges" not in held or set(held) - set(fields) or not _rows(held["edges"]):
        raise ValueError(f"{name} holds no circuit; write one with circuit.save(path).")
    edges = [[*ends, math.nan if score is None else score] for *ends, score in held["edges"]]
    return {**held, "edges": edges}


def _rows(edges: Any) -> bool:
    """Whether these are rows of writer, reader, span and score."""
    return isinstance(edges, list) and all(isinstance(one, list) and len(one) == 4 for one in edges)


def as_html(said: str, edges: Sequence[tuple[str, float]], nodes: Sequence[str]) -> str:
    """A circuit as a notebook shows it: what it is, and its edges with the largest scores, or nodes.

    Args:
        said: the circuit in words.
        edges: each in words, with its score.
    """
    order = sorted(edges, key=lambda edge: -abs(edge[1]) if math.isfinite(edge[1]) else 0.0)
    every = [*order, *((node, math.nan) for node in nodes)]
    rows = [(escape(name), f"{score:+.4g}" if math.isfinite(score) else "") for name, score in every[:SHOWN]]
    if len(every) > SHOWN:
        rows.append((f"and {len(every) - SHOWN} more", ""))
    cells = "".join(f"<tr><td>{name}</td><td>{score}</td></tr>" for name, score in rows)
    return f"<b>{escape(said)}</b><table>{cells}</table>"
