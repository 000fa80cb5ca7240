"""mechvlm: where, and why, does a vision-language model use the image, or ignore it?

>>> import mechvlm as mv
>>> vlm = mv.load("demo")
>>> real = vlm.prompt(mv.demo.scenes()[0].image, "Is there a 7 in the image?")
>>> null = real.with_image(mv.images.black)
>>> mv.plot.heatmap(mv.ablate_each_head(vlm, real, mv.logit_difference("yes", "no")))  # doctest: +ELLIPSIS
Figure(...)

Models and prompts: load, VLM, Prompt, ImageMap, images (null images), image_regions, tile_regions, tokens_in,
MinimalPair, demo. Addresses and edits: Site, Edit, ablate_heads, scale_heads, bias_attention, cut_attention,
scale_attention, patch, steer, replace_span. Readings: rows, mass, entropy, top_keys, lazy (an Attention, not made).
Metrics: logit_difference, log_probability, probability, rank, kl_divergence.
Experiments: attention_profile, attention_map, sinks, answer_probabilities, dose_response, deletion_curve,
gradient_attribution, input_times_gradient, integrated_gradients, smooth_grad, gradient_attention, relevancy, span_flow,
attention_rollout, attention_flow, queries_to_patches, compose_queries. Maps held against the model: occlusion,
compare_maps. Lenses: logit_lens, tuned_lens, object_map, segmentation_scores, word_share. Patching: patch_spans,
patch_positions, patch_heads, patch_features, patch_pairs, path_patching, back_patching. Attribution:
attribution_patching, edge_attribution, direct_logit_attribution. Circuits: Circuit, Edge, choose_circuit,
circuit_faithfulness, circuit_overlap, circuit_stability. Circuits of
weights: composition_scores, ov_writes. What heads look at: label_heads.
Ablations: ablate_each_head, ablate_each, ablate_in_order, ablate_all_but, strongest, find_heads, heads_found,
soft_identity, ablate_image_tokens, norm_outliers, gradient_tokens, mean_activations, mean_features, accuracy,
answer_accuracy. Knockout and tracing: information_flow, knockout_answers, causal_trace. Layer by layer: layer_profile,
attention_blocks, find_zone, u_shape, neglect_heads, language_prior_collapse, gradient_by_layer. Your own: sweep,
mean_interval.
Benchmarks and statistics: evaluate. Published methods: methods. Figures: plot. Jobs elsewhere: remote. Several
processes: workers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mechvlm import images as images
from mechvlm.attention_edits import bias_attention as bias_attention
from mechvlm.attention_edits import cut_attention as cut_attention
from mechvlm.attention_edits import scale_attention as scale_attention
from mechvlm.circuit_value import Circuit as Circuit
from mechvlm.edge_paths import Edge as Edge
from mechvlm.edits import Edit as Edit
from mechvlm.edits import ablate_heads as ablate_heads
from mechvlm.edits import patch as patch
from mechvlm.edits import replace_span as replace_span
from mechvlm.edits import scale_heads as scale_heads
from mechvlm.edits import steer as steer
from mechvlm.imagemap import ImageMap as ImageMap
from mechvlm.lazy_attention import Attention as Attention
from mechvlm.load import load as load
from mechvlm.metrics import kl_divergence as kl_divergence
from mechvlm.metrics import log_probability as log_probability
from mechvlm.metrics import logit_difference as logit_difference
from mechvlm.metrics import probability as probability
from mechvlm.metrics import rank as rank
from mechvlm.pairs import MinimalPair as MinimalPair
from mechvlm.prompt import Prompt as Prompt
from mechvlm.readings import entropy as entropy
from mechvlm.readings import lazy as lazy
from mechvlm.readings import mass as mass
from mechvlm.readings import rows as rows
from mechvlm.readings import top_keys as top_keys
from mechvlm.regions import image_regions as image_regions
from mechvlm.regions import tile_regions as tile_regions
from mechvlm.regions import tokens_in as tokens_in
from mechvlm.run import Generation as Generation
from mechvlm.run import Run as Run
from mechvlm.sites import Site as Site
from mechvlm.vlm import VLM as VLM

if TYPE_CHECKING:
    from mechvlm import demo as demo
    from mechvlm import evaluate as evaluate
    from mechvlm import methods as methods
    from mechvlm import plot as plot
    from mechvlm import remote as remote
    from mechvlm import workers as workers
    from mechvlm.bridge import bridged as bridged
    from mechvlm.circuits import cache_sites as cache_sites
    from mechvlm.experiments.ablation import ablate_each_head as ablate_each_head
    from mechvlm.experiments.ablations import ablate_each as ablate_each
    from mechvlm.experiments.accuracy import accuracy as accuracy
    from mechvlm.experiments.accuracy import answer_accuracy as answer_accuracy
    from mechvlm.experiments.answers import answer_probabilities as answer_probabilities
    from mechvlm.experiments.attributed_patches import attribution_patching as attribution_patching
    from mechvlm.experiments.attribution import gradient_attribution as gradient_attribution
    from mechvlm.experiments.back_patches import back_patching as back_patching
    from mechvlm.experiments.bends import u_shape as u_shape
    from mechvlm.experiments.choosing import choose_circuit as choose_circuit
    from mechvlm.experiments.circuit_overlaps import circuit_overlap as circuit_overlap
    from mechvlm.experiments.circuit_overlaps import circuit_stability as circuit_stability
    from mechvlm.experiments.collapse import language_prior_collapse as language_prior_collapse
    from mechvlm.experiments.compared import compare_maps as compare_maps
    from mechvlm.experiments.decoding import knockout_answers as knockout_answers
    from mechvlm.experiments.deletion import deletion_curve as deletion_curve
    from mechvlm.experiments.direct_logits import direct_logit_attribution as direct_logit_attribution
    from mechvlm.experiments.dose import dose_response as dose_response
    from mechvlm.experiments.edge_scores import edge_attribution as edge_attribution
    from mechvlm.experiments.faithfulness import circuit_faithfulness as circuit_faithfulness
    from mechvlm.experiments.head_labels import label_heads as label_heads
    from mechvlm.experiments.heads import find_heads as find_heads
    from mechvlm.experiments.heads import heads_found as heads_found
    from mechvlm.experiments.heads import soft_identity as soft_identity
    from mechvlm.experiments.knockout import information_flow as information_flow
    from mechvlm.experiments.layer_profile import attention_blocks as attention_blocks
    from mechvlm.experiments.layer_profile import layer_profile as layer_profile
    from mechvlm.experiments.lens import logit_lens as logit_lens
    from mechvlm.experiments.lens_maps import object_map as object_map
    from mechvlm.experiments.lens_maps import segmentation_scores as segmentation_scores
    from mechvlm.experiments.lens_maps import word_share as word_share
    from mechvlm.experiments.means import mean_activations as mean_activations
    from mechvlm.experiments.means import mean_features as mean_features
    from mechvlm.experiments.neglect import neglect_heads as neglect_heads
    from mechvlm.experiments.occlusion import occlusion as occlusion
    from mechvlm.experiments.order import ablate_all_but as ablate_all_but
    from mechvlm.experiments.order import ablate_in_order as ablate_in_order
    from mechvlm.experiments.order import strongest as strongest
    from mechvlm.experiments.ov_words import ov_writes as ov_writes
    from mechvlm.experiments.patch_features import patch_features as patch_features
    from mechvlm.experiments.patch_heads import patch_heads as patch_heads
    from mechvlm.experiments.patch_pairs import patch_pairs as patch_pairs
    from mechvlm.experiments.patching import patch_positions as patch_positions
    from mechvlm.experiments.patching import patch_spans as patch_spans
    from mechvlm.experiments.path_effects import path_patching as path_patching
    from mechvlm.experiments.profile import attention_map as attention_map
    from mechvlm.experiments.profile import attention_profile as attention_profile
    from mechvlm.experiments.queries import compose_queries as compose_queries
    from mechvlm.experiments.queries import queries_to_patches as queries_to_patches
    from mechvlm.experiments.relevance import gradient_attention as gradient_attention
    from mechvlm.experiments.relevance import relevancy as relevancy
    from mechvlm.experiments.relevance import span_flow as span_flow
    from mechvlm.experiments.rollout import attention_flow as attention_flow
    from mechvlm.experiments.rollout import attention_rollout as attention_rollout
    from mechvlm.experiments.saliency import input_times_gradient as input_times_gradient
    from mechvlm.experiments.saliency import integrated_gradients as integrated_gradients
    from mechvlm.experiments.saliency import smooth_grad as smooth_grad
    from mechvlm.experiments.sinks import sink_positions as sink_positions
    from mechvlm.experiments.sinks import sinks as sinks
    from mechvlm.experiments.sweep import sweep as sweep
    from mechvlm.experiments.tokens import ablate_image_tokens as ablate_image_tokens
    from mechvlm.experiments.tokens import gradient_tokens as gradient_tokens
    from mechvlm.experiments.tokens import norm_outliers as norm_outliers
    from mechvlm.experiments.tracing import causal_trace as causal_trace
    from mechvlm.experiments.translators import tuned_lens as tuned_lens
    from mechvlm.experiments.uncertainty import mean_interval as mean_interval
    from mechvlm.experiments.visual_gradient import gradient_by_layer as gradient_by_layer
    from mechvlm.experiments.weight_circuits import composition_scores as composition_scores
    from mechvlm.experiments.zones import find_zone as find_zone

__version__ = "0.1.0"

# Experiments and figures stand on xarray and plotly, as long to import as all the rest; they come when asked for.
_LATER = {
    "demo": "mechvlm.demo",
    "evaluate": "mechvlm.evaluate",
    "methods": "mechvlm.methods",
    "plot": "mechvlm.plot",
    "remote": "mechvlm.remote",
    "workers": "mechvlm.workers",
    "ablate_each_head": "mechvlm.experiments.ablation",
    "ablate_each": "mechvlm.experiments.ablations",
    "accuracy": "mechvlm.experiments.accuracy",
    "answer_accuracy": "mechvlm.experiments.accuracy",
    "find_heads": "mechvlm.experiments.heads",
    "heads_found": "mechvlm.experiments.heads",
    "soft_identity": "mechvlm.experiments.heads",
    "mean_activations": "mechvlm.experiments.means",
    "mean_features": "mechvlm.experiments.means",
    "ablate_all_but": "mechvlm.experiments.order",
    "ablate_in_order": "mechvlm.experiments.order",
    "strongest": "mechvlm.experiments.order",
    "ablate_image_tokens": "mechvlm.experiments.tokens",
    "gradient_tokens": "mechvlm.experiments.tokens",
    "norm_outliers": "mechvlm.experiments.tokens",
    "answer_probabilities": "mechvlm.experiments.answers",
    "attribution_patching": "mechvlm.experiments.attributed_patches",
    "choose_circuit": "mechvlm.experiments.choosing",
    "circuit_faithfulness": "mechvlm.experiments.faithfulness",
    "circuit_overlap": "mechvlm.experiments.circuit_overlaps",
    "circuit_stability": "mechvlm.experiments.circuit_overlaps",
    "gradient_attribution": "mechvlm.experiments.attribution",
    "back_patching": "mechvlm.experiments.back_patches",
    "language_prior_collapse": "mechvlm.experiments.collapse",
    "compare_maps": "mechvlm.experiments.compared",
    "knockout_answers": "mechvlm.experiments.decoding",
    "deletion_curve": "mechvlm.experiments.deletion",
    "composition_scores": "mechvlm.experiments.weight_circuits",
    "label_heads": "mechvlm.experiments.head_labels",
    "ov_writes": "mechvlm.experiments.ov_words",
    "direct_logit_attribution": "mechvlm.experiments.direct_logits",
    "dose_response": "mechvlm.experiments.dose",
    "edge_attribution": "mechvlm.experiments.edge_scores",
    "information_flow": "mechvlm.experiments.knockout",
    "attention_blocks": "mechvlm.experiments.layer_profile",
    "layer_profile": "mechvlm.experiments.layer_profile",
    "logit_lens": "mechvlm.experiments.lens",
    "object_map": "mechvlm.experiments.lens_maps",
    "segmentation_scores": "mechvlm.experiments.lens_maps",
    "word_share": "mechvlm.experiments.lens_maps",
    "occlusion": "mechvlm.experiments.occlusion",
    "patch_features": "mechvlm.experiments.patch_features",
    "patch_heads": "mechvlm.experiments.patch_heads",
    "patch_pairs": "mechvlm.experiments.patch_pairs",
    "patch_positions": "mechvlm.experiments.patching",
    "patch_spans": "mechvlm.experiments.patching",
    "path_patching": "mechvlm.experiments.path_effects",
    "attention_map": "mechvlm.experiments.profile",
    "attention_profile": "mechvlm.experiments.profile",
    "bridged": "mechvlm.bridge",
    "cache_sites": "mechvlm.circuits",
    "compose_queries": "mechvlm.experiments.queries",
    "queries_to_patches": "mechvlm.experiments.queries",
    "input_times_gradient": "mechvlm.experiments.saliency",
    "integrated_gradients": "mechvlm.experiments.saliency",
    "smooth_grad": "mechvlm.experiments.saliency",
    "gradient_attention": "mechvlm.experiments.relevance",
    "relevancy": "mechvlm.experiments.relevance",
    "span_flow": "mechvlm.experiments.relevance",
    "attention_flow": "mechvlm.experiments.rollout",
    "attention_rollout": "mechvlm.experiments.rollout",
    "sink_positions": "mechvlm.experiments.sinks",
    "sinks": "mechvlm.experiments.sinks",
    "sweep": "mechvlm.experiments.sweep",
    "causal_trace": "mechvlm.experiments.tracing",
    "tuned_lens": "mechvlm.experiments.translators",
    "mean_interval": "mechvlm.experiments.uncertainty",
    "find_zone": "mechvlm.experiments.zones",
    "u_shape": "mechvlm.experiments.bends",
    "neglect_heads": "mechvlm.experiments.neglect",
    "gradient_by_layer": "mechvlm.experiments.visual_gradient",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'mechvlm' has no attribute {name!r}")
    module = import_module(_LATER[name])
    found = module if _LATER[name] == f"mechvlm.{name}" else vars(module)[name]
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER} - {"Any", "TYPE_CHECKING", "import_module"})
