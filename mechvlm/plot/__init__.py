"""Figures of results: every function takes results and returns a plotly Figure.

Rule this package guards: a figure is a value. Nothing here runs a model, opens a window or writes a file, and no model
is known. Colours can be told apart by colour-blind readers. Titles and captions are plotly's text, so `<b>` works in
them; texts that come from data are shown as they are.

Arrays with named dims: `lines`, `bars`, `heatmap`. An order against chance: `deletion`; several: `compared_maps`.
Ablations: `effects`, `ablation_order`, `head_search`, `token_sets`. Cuts and restorations layer by layer: `flow`,
`tracing`. Words of the logit lens from layer to layer: `words_by_layer`. Patches: `patched_positions` (layer by
position, with the words), `patched_pairs` (means over pairs, with intervals and controls), `layers_over_image` (the
picture once a layer), `attributed` (estimates against patches), `senders` (paths, by what writes), `edges` (their
scores, as a graph). Parts of a logit by layer: `direct_logits`. Circuits: `circuit` (as a graph), `faithfulness` (by
size).
Attention layer by layer: `zone_curve`, `head_matrix`, `published_beside`, `layer_spans`. Real and null pictures, and
gradients, layer by layer: `collapse_curves`, `gradient_decay`. Evaluations: `comparison`, `threshold_curve`,
`reliability_diagram`, `association`. A bias beside a moved threshold, and layers beside random ones: `dose_curves`,
`layer_controls`. On the picture that a prompt asks about: `over_image` (a colour for each image token),
`pixels_over_image` (for each pixel), `tokens_over_image` (the logit lens's words), `sinks_over_image` (attention
sinks), `token_grid` (the squares alone).

>>> figure = lines(profile.mass.mean(["example", "head"]), x="layer", colour="span")
>>> figure.show(), figure.write_html("profile.html")
"""

from mechvlm.plot.ablations import ablation_order as ablation_order
from mechvlm.plot.ablations import effects as effects
from mechvlm.plot.ablations import head_search as head_search
from mechvlm.plot.ablations import token_sets as token_sets
from mechvlm.plot.attributed import attributed as attributed
from mechvlm.plot.causes import flow as flow
from mechvlm.plot.causes import tracing as tracing
from mechvlm.plot.charts import bars as bars
from mechvlm.plot.charts import heatmap as heatmap
from mechvlm.plot.charts import lines as lines
from mechvlm.plot.collapse import collapse_curves as collapse_curves
from mechvlm.plot.collapse import gradient_decay as gradient_decay
from mechvlm.plot.compared import compared_maps as compared_maps
from mechvlm.plot.curves import deletion as deletion
from mechvlm.plot.direct import direct_logits as direct_logits
from mechvlm.plot.doses import dose_curves as dose_curves
from mechvlm.plot.doses import layer_controls as layer_controls
from mechvlm.plot.faithful import faithfulness as faithfulness
from mechvlm.plot.graph import edges as edges
from mechvlm.plot.lenses import words_by_layer as words_by_layer
from mechvlm.plot.marks import sinks_over_image as sinks_over_image
from mechvlm.plot.patched import layers_over_image as layers_over_image
from mechvlm.plot.patched import patched_pairs as patched_pairs
from mechvlm.plot.patched import patched_positions as patched_positions
from mechvlm.plot.paths import senders as senders
from mechvlm.plot.pictures import over_image as over_image
from mechvlm.plot.pictures import token_grid as token_grid
from mechvlm.plot.pictures import tokens_over_image as tokens_over_image
from mechvlm.plot.points import pixels_over_image as pixels_over_image
from mechvlm.plot.statistics import association as association
from mechvlm.plot.statistics import comparison as comparison
from mechvlm.plot.statistics import reliability_diagram as reliability_diagram
from mechvlm.plot.statistics import threshold_curve as threshold_curve
from mechvlm.plot.wiring import circuit as circuit
from mechvlm.plot.zones import head_matrix as head_matrix
from mechvlm.plot.zones import layer_spans as layer_spans
from mechvlm.plot.zones import published_beside as published_beside
from mechvlm.plot.zones import zone_curve as zone_curve

__all__ = [
    "ablation_order",
    "association",
    "attributed",
    "bars",
    "circuit",
    "collapse_curves",
    "compared_maps",
    "comparison",
    "deletion",
    "direct_logits",
    "dose_curves",
    "edges",
    "effects",
    "faithfulness",
    "flow",
    "gradient_decay",
    "head_matrix",
    "head_search",
    "heatmap",
    "layer_controls",
    "layer_spans",
    "layers_over_image",
    "lines",
    "over_image",
    "patched_pairs",
    "patched_positions",
    "pixels_over_image",
    "published_beside",
    "reliability_diagram",
    "senders",
    "sinks_over_image",
    "threshold_curve",
    "token_grid",
    "token_sets",
    "tokens_over_image",
    "tracing",
    "words_by_layer",
    "zone_curve",
]
