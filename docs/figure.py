"""Draw docs/figure.png: what the demo model holds at each image token, drawn on the picture it was asked about.

python docs/figure.py     # needs kaleido and a browser, which nothing else here does
"""

from pathlib import Path

import mechvlm as mv


def main() -> None:
    """Write the README's figure."""
    vlm = mv.load("demo")
    scene = mv.demo.scenes()[0]
    real = vlm.prompt(scene.image, f"Is there a {scene.scene.items[0].digit} in the image?")
    lens = mv.logit_lens(vlm, real, positions=real.image)
    figure = mv.plot.tokens_over_image(lens, real, layer=4, title=real.words, caption="")
    figure.write_image(Path(__file__).parent / "figure.png", width=760, height=760, scale=1)


if __name__ == "__main__":
    main()
