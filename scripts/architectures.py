"""Run every law on every architecture and write down what was found: docs/architectures.{json,md} and README's table.

    python scripts/architectures.py            # measure and write; needs what pip installs with "mechvlm[test]"
    python scripts/architectures.py --lens     # add law 11 to what is written; needs TransformerLens as well
    python scripts/architectures.py --tables   # write the tables again from docs/architectures.json

The tiny models are those of tests/zoo. tests/test_architectures.py fails where a law finds anything else, and
tests/test_readme.py where a table is stale.
"""

import argparse
import json
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import beartype  # noqa: E402, F401  (before nnsight, which mounts `.save` on `object`)
import torch  # noqa: E402
from jinja2 import Template  # noqa: E402

FILE = ROOT / "docs" / "architectures.json"
KERNELS = ("sdpa", "eager")
TYPES = {"float32": torch.float32, "float64": torch.float64}
TOWERS = ("text", "vision", "qformer")
LAWS = tuple(range(1, 14))
LAYOUTS = {
    "square": "one grid",
    "anyres": "overview and unpadded tiles, row ends",
    "tiled": "tiles and overview",
    "internvl": "tiles and overview",
    "ovis": "tiles and overview",
    "molmo": "overview and overlapping crops, pooled",
    "patches": "one grid of any size, 2 x 2 patches a token",
    "pixtral": "one grid of any size, row ends",
    "queries": "32 queries; patches by composition",
    "mllama": "one token; tiles are keys of cross-attention",
    "deepseek": "one grid",
}
"""How the image tokens lie on the picture, by the module of `mechvlm.grids`."""


def measure() -> dict[str, Any]:
    """What every law finds on every variant, kernel and type."""
    import tiny
    import zoo

    from mechvlm import laws

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in zoo.VARIANTS:
        sys.stderr.write(f"{name}\n")
        found[name] = {}
        for kernel in KERNELS:
            if kernel != "eager" and name in zoo.EAGER_ONLY:
                found[name][kernel] = zoo.EAGER_ONLY[name]
                continue
            found[name][kernel] = {}
            for kind, dtype in TYPES.items():
                vlm = zoo.build(name, kernel, dtype, processor=not zoo.VARIANTS[name].needs_torchvision)
                prompt = zoo.ask(vlm, tiny.picture(width=48, height=48))
                found[name]["architecture"] = vlm.hf.config.model_type
                found[name]["towers"] = list(vlm.shape.layers)
                found[name][kernel][kind] = written(laws.LAWS, vlm, prompt)
    return found


def measure_lens() -> dict[str, Any]:
    """What law 11 finds on every variant that TransformerLens has, under eager attention."""
    import tiny
    import zoo
    from test_bridge import BOTH

    from mechvlm.laws_bridge import law_11_transformer_lens

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in BOTH:
        sys.stderr.write(f"{name}\n")
        found[name] = {}
        for kind, dtype in TYPES.items():
            vlm = zoo.build(name, "eager", dtype, processor=not zoo.VARIANTS[name].needs_torchvision)
            prompt = zoo.ask(vlm, tiny.picture(width=40, height=28))
            found[name][kind] = written((law_11_transformer_lens,), vlm, prompt)
    return found


def written(chosen: Any, vlm: Any, prompt: Any) -> list[list]:
    """What laws find, by law and tower: how many findings, the largest error, and whether all hold."""
    return summary([one for law in chosen for one in law(vlm, prompt)])


def summary(findings: list[Any]) -> list[list]:
    """The same of findings that are there."""
    groups: dict[tuple[int, str], list[Any]] = {}
    for one in findings:
        groups.setdefault((one.law, tower_of(one.what)), []).append(one)
    return [
        [law, tower, len(some), float(f"{max(one.error for one in some):.1e}"), verdict_of(some)]
        for (law, tower), some in groups.items()
    ]


def verdict_of(findings: list[Any]) -> str:
    """Whether all hold."""
    return "holds" if all(one.holds for one in findings) else "BROKEN"


def tower_of(what: str) -> str:
    """The tower that a finding is about."""
    return next((tower for tower in TOWERS[1:] if re.search(rf"\b{tower}\b", what)), "text")


def matrix(found: dict[str, Any]) -> str:
    """Architectures x laws x kernels x towers: the largest error of each."""
    head = ["model", "kernel", "tower", *[f"law {law}" for law in LAWS]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, one in found.items():
        for kernel in KERNELS:
            if isinstance(one[kernel], str):
                lines.append(f"| `{name}` | {kernel} | refused: {one[kernel]} |" + " |" * (len(head) - 3))
                continue
            rows = one[kernel]["float32"] + (one.get("lens", {}).get("float32", []) if kernel == "eager" else [])
            for tower in one["towers"]:
                cells = [cell([row for row in rows if row[:2] == [law, tower]]) for law in LAWS]
                lines.append(f"| `{name}` | {kernel} | {tower} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(rows: list[list]) -> str:
    """The largest error of some findings, or that there is none."""
    if not rows:
        return "·"
    broken = [row for row in rows if row[4] != "holds"]
    return f"**{max(row[3] for row in broken):.1e}**" if broken else said(max(row[3] for row in rows))


def said(error: float) -> str:
    """An error as tables write it."""
    return "0" if error == 0 else f"{error:.1e}"


def errors(found: dict[str, Any]) -> str:
    """The largest error of laws 3, 4, 6, 10 and 11 by architecture, in float32 and float64."""
    chosen = (3, 4, 6, 10, 11)
    head = ["architecture", *[f"law {law}, {kind}" for law in chosen for kind in TYPES]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in sorted({one["architecture"] for one in found.values()}):
        cells = []
        for law in chosen:
            for kind in TYPES:
                parts = [
                    part
                    for one in found.values()
                    if one["architecture"] == name
                    for part in (*[one[kernel] for kernel in KERNELS], one.get("lens", {}))
                    if not isinstance(part, str)
                ]
                cells.append(cell([row for part in parts for row in part.get(kind, []) if row[0] == law]))
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readme_table(found: dict[str, Any]) -> str:
    """README's table: a row an architecture, of its row in `ARCHS` and of what the laws found."""
    from mechvlm.archs import ARCHS

    lines = [
        "| architecture | for instance | towers | image tokens | gradients | generate | as TransformerLens |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in ARCHS.items():
        mine = [one for one in found.values() if one.get("architecture") == name]
        rows = [
            row
            for one in mine
            for kernel in KERNELS
            if not isinstance(one[kernel], str)
            for kind in one[kernel].values()
            for row in kind
        ]
        lens = [row for one in mine for kind in one.get("lens", {}).values() for row in kind]
        layout = LAYOUTS[row.grid] if holds(rows, 13) else "**broken**"
        lines.append(
            f"| `{name}` | `{row.example}` | {', '.join(mine[0]['towers'])} | {layout} | {verdict(rows, 10)} | "
            f"{verdict(rows, 9)} | {verdict(lens, 11) if lens else '-'} |"
        )
    return "\n".join(lines)


def holds(rows: list[list], law: int) -> bool:
    """Whether a law was looked at and nothing broke it."""
    mine = [row for row in rows if row[0] == law]
    return bool(mine) and all(row[4] == "holds" for row in mine)


def verdict(rows: list[list], law: int) -> str:
    """The same as tables write it."""
    return "yes" if holds(rows, law) else "**no**"


def page(found: dict[str, Any], made: str) -> str:
    """docs/architectures.md."""
    from mechvlm.refusals import REFUSED

    template = Template((Path(__file__).parent / "architectures.md.j2").read_text(), keep_trailing_newline=True)
    return template.render(made=made, matrix=matrix(found), errors=errors(found), refused=sorted(REFUSED.items()))


def write(found: dict[str, Any], made: str) -> None:
    """Write the page and README's table."""
    (ROOT / "docs" / "architectures.md").write_text(page(found, made))
    readme = ROOT / "README.md"
    start, end = "<!-- architectures: made by scripts/architectures.py -->\n", "\n<!-- end of architectures -->"
    text = readme.read_text()
    before, rest = text.split(start)
    readme.write_text(before + start + readme_table(found) + end + rest.split(end)[1])


def lines_of(held: dict[str, Any]) -> str:
    """What was found, with a line for each model, kernel and type."""
    text = json.dumps(held, indent=1)
    return re.sub(r"\n {5,}|\n {4}(?=\])", " ", text) + "\n"


def main() -> None:
    """Measure what was asked for, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lens", action="store_true", help="only law 11, added to what is written")
    parser.add_argument("--tables", action="store_true", help="only the tables")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    held = json.loads(FILE.read_text()) if FILE.is_file() else {"models": {}}
    if chosen.lens:
        for name, kinds in measure_lens().items():
            held["models"][name]["lens"] = kinds
    elif not chosen.tables:
        lens = {name: one["lens"] for name, one in held["models"].items() if "lens" in one}
        models = measure()
        for name, one in lens.items():
            models.get(name, {})["lens"] = one
        made = ", ".join(f"{package} {version(package)}" for package in ("transformers", "torch", "nnsight"))
        held = {"made": made, "models": models}
    FILE.write_text(lines_of(held))
    write(held["models"], held["made"])


if __name__ == "__main__":
    main()
