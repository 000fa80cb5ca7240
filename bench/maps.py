"""Which maps of a picture point at what the answer rests on? On the demo model, by deletion, insertion and occlusion.

Each scene's first digit is asked for ("Is there a red 3 in the image?"), and the metric is the logit of yes minus that
of no; the null picture is black. Printed are means over scenes with 95 % intervals over pictures: the advantage of
deletion and of insertion over random orders (0 is chance), p-values corrected by Holm over all maps and both ways, the
area under each curve (0: the null picture's answer, 1: the picture's), and the rank correlation with occlusion, which
takes each token away by a run of its own. The figure, where a file is named for it, is of the first scene.

    python bench/maps.py [--scenes 20] [--at image_features pixels] [--samples 20] [--threads 2] [--figure maps.png]
"""

import argparse
import time
from collections.abc import Sequence

import torch
import xarray as xr

import mechvlm as mv
from mechvlm import demo

HEAD = (
    "| map | deletion: advantage | p | insertion: advantage | p | area, deletion | area, insertion | agreement |\n"
    "|---|---|--:|---|--:|--:|--:|---|"
)


def questions(vlm: mv.VLM, count: int) -> list[mv.Prompt]:
    """A question with the answer yes about each of the first scenes."""
    scenes = demo.scenes()[:count]
    return [vlm.prompt(one.image, f"Is there a {one.scene.items[0].name} in the image?") for one in scenes]


def between(found: xr.Dataset, name: str) -> str:
    """A mean with its interval."""
    mean, low, high = (float(found[f"{name}_{end}"]) for end in ("mean", "low", "high"))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def table(found: xr.Dataset) -> str:
    """A row for each map."""
    lines = [HEAD]
    for name in found["map"].values:
        one = found.sel(map=name)
        ways = [one.sel(mode=mode) for mode in ("deletion", "insertion")]
        gained = [f"{between(way, 'advantage')} | {float(way.p_holm):.2g}" for way in ways]
        areas = [f"{float(way.area_mean):.2f}" for way in ways]
        lines.append(f"| {name} | {' | '.join((*gained, *areas, between(one.sel(other='occlusion'), 'agreement')))} |")
    random = found.random_area.weighted((found.value - found.null_value).clip(0)).mean(["prompt", "sample"])
    heights = " | ".join(f"{float(random.sel(mode=mode)):.2f}" for mode in ("deletion", "insertion"))
    return "\n".join([*lines, f"| random orders, mean | 0 | | 0 | | {heights} | |"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the maps and print a table for each place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--at", nargs="+", default=["image_features", "pixels"])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figure")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    vlm = mv.load("demo")
    prompts = questions(vlm, given.scenes)
    for at in given.at:
        start = time.perf_counter()
        found = mv.compare_maps(vlm, prompts, mv.logit_difference("yes", "no"), at=at, samples=given.samples)
        took = time.perf_counter() - start
        left = found.attrs["left_out"]
        print(f"\n{given.scenes} scenes, {left} left out; at {at}; {took / given.scenes:.1f} s a scene\n")
        print(table(found))
        if given.figure and at == given.at[0]:
            mv.plot.compared_maps(found, prompts[0]).write_image(given.figure, scale=2)


if __name__ == "__main__":
    main()
