"""How wrong attribution is: every node of the demo model patched exactly, beside what each method estimates of it.

A scene's pair is its picture with something red or green in it, and the same with red and green swapped in that square;
the question is whether the thing is there, so that the answer changes from yes to no. Pairs of which either answer is
wrong are left out. In each pair every node of every kind is patched (from the picture that has the thing into the other
one), and each method's estimates are held against that: Pearson's r over all nodes, and precision at 20, the share of
the 20 largest estimates that are among the 20 largest effects, by size. Figures are means over scenes with 95 %
intervals. Estimates without sign (drop, atp*) are held against the effects' sizes.

Edges likewise, all of them, summed over positions; shares of information flow are held against the effects' sizes.

    python bench/attribution_errors.py [--scenes 50] [--kinds resid_pre q k v z attn_out mlp_out] [--no-edges]
"""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
import xarray as xr
from PIL import Image
from tqdm import tqdm

import mechvlm as mv

TOP = 20
METHODS: dict[str, dict[str, Any]] = {
    "AtP": {"method": "atp"},
    "AtP, softmax made anew (qk)": {"method": "qk"},
    "AtP, layers left out (drop)": {"method": "drop"},
    "AtP*": {"method": "atp*"},
    "node IG, embeddings, 5 points": {"method": "ig", "steps": 5},
    "node IG, pixels, 5 points": {"method": "ig", "steps": 5, "path": "pixels"},
}
EDGE_METHODS: dict[str, dict[str, Any]] = {
    "EAP": {"method": "eap"},
    "EAP-IG, 5 points": {"method": "eap-ig", "steps": 5},
    "clean and corrupted": {"method": "clean-corrupted"},
    "EAP-IG, activations, 5 points": {"method": "ig-activations", "steps": 5},
    "information flow routes": {"method": "information-flow-routes"},
}
METRIC = mv.logit_difference("yes", "no")


def other(picture: Any, name: str) -> Image.Image:
    """The picture with red and green swapped in each square of a thing."""
    image = picture.image
    for item in picture.scene.items:
        if item.name == name:
            x, y = 24 * (item.cell % 3), 24 * (item.cell // 3)
            red, green, blue = image.crop((x, y, x + 24, y + 24)).split()
            image.paste(Image.merge("RGB", (green, red, blue)), (x, y))
    return image


def pairs(vlm: mv.VLM) -> Iterator[tuple[mv.Prompt, mv.Prompt]]:
    """For each scene with something red or green in it that is answered right both ways: with it, and without."""
    margin = vlm.metric(METRIC)
    for picture in mv.demo.scenes():
        names = [item.name for item in picture.scene.items if item.name.split()[0] in ("red", "green")]
        if not names:
            continue
        question = f"Is there a {names[0]} in the image?"
        both = [vlm.prompt(image, question) for image in (picture.image, other(picture, names[0]))]
        with_it, without = (float(margin(vlm.run(prompt).logits)) for prompt in both)
        if with_it > 0 > without:
            yield both[0], both[1]


def held(estimate: np.ndarray, exact: np.ndarray, signed: bool) -> tuple[float, float]:
    """Pearson's r, and the share of the largest estimates that are among the largest effects."""
    exact = exact if signed else np.abs(exact)
    top, truth = (set(np.argsort(-np.abs(x), kind="stable")[:TOP]) for x in (estimate, exact))
    varies = estimate.std() > 0 and exact.std() > 0
    return float(np.corrcoef(estimate, exact)[0, 1]) if varies else float("nan"), len(top & truth) / TOP


def nodes(vlm: mv.VLM, scenes: list, kinds: list[str]) -> xr.Dataset:
    """For each scene, kind and method how good the estimates are."""
    found = np.full((2, len(scenes), len(kinds), len(METHODS)), np.nan)
    for scene, (source, target) in enumerate(tqdm(scenes, "nodes")):
        every = mv.attribution_patching(vlm, source, target, METRIC, kinds, verify=10**6)
        for number, how in enumerate(METHODS.values()):
            made = mv.attribution_patching(vlm, source, target, METRIC, kinds, **how)
            for at, kind in enumerate(kinds):
                patched = every.sel(kind=kind)
                there = patched.exact.notnull().values
                order = {"layer": patched.node_layer, "position": patched.node_position}
                order |= {str(dim): patched.node_head for dim in made[kind].dims[2:]}
                places = {name: xr.DataArray(one.values[there], dims="node") for name, one in order.items()}
                estimate = made[kind].sel(places).values
                found[:, scene, at, number] = held(estimate, patched.exact.values[there], bool(made.attrs["signed"]))
    return tabled(found, kind=kinds, method=list(METHODS))


def edges(vlm: mv.VLM, scenes: list) -> xr.Dataset:
    """For each scene and method how good the scores of edges are."""
    found = np.full((2, len(scenes), 1, len(EDGE_METHODS)), np.nan)
    for scene, (source, target) in enumerate(tqdm(scenes, "edges")):
        exact = mv.edge_attribution(vlm, source, target, METRIC, method="exact").score.values
        there = np.isfinite(exact)
        for number, how in enumerate(EDGE_METHODS.values()):
            score = mv.edge_attribution(vlm, source, target, METRIC, **how).score.values[there]
            signed = how["method"] != "information-flow-routes"
            found[:, scene, 0, number] = held(score, exact[there], signed)
    return tabled(found, kind=["edges"], method=list(EDGE_METHODS))


def tabled(found: np.ndarray, **axes: list[str]) -> xr.Dataset:
    """Pearson's r and precision, over scenes and further axes."""
    dims = ["scene", *axes]
    return xr.Dataset({"pearson": (dims, found[0]), f"precision@{TOP}": (dims, found[1])}, coords=axes)


def said(values: xr.DataArray) -> str:
    """A mean over scenes with its interval."""
    if bool(values.isnull().all()):
        return "no value"
    one = mv.mean_interval(values.dropna("scene"), "scene")
    return f"{float(one['mean']):.3f} [{float(one['low']):.3f}, {float(one['high']):.3f}]"


def shown(found: xr.Dataset, by: str) -> None:
    """The table, in markdown."""
    print(f"| {by} | method | Pearson's r | precision at {TOP} |\n|---|---|---|---|")
    for value in found[by].values:
        for method in found.method.values:
            one = found.sel({by: value, "method": method})
            print(f"| {value} | {method} | {said(one.pearson)} | {said(one[f'precision@{TOP}'])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--kinds", nargs="*", default=["resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out"])
    parser.add_argument("--edges", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    vlm = mv.load("demo")
    scenes = [both for _, both in zip(range(arguments.scenes), pairs(vlm), strict=False)]
    print(f"{len(scenes)} scenes; torch {torch.__version__}, transformers {transformers.__version__}\n")
    if arguments.kinds:
        shown(nodes(vlm, scenes, arguments.kinds), "kind")
    if arguments.edges:
        shown(edges(vlm, scenes), "kind")


if __name__ == "__main__":
    main()
