"""mechvlm: where, and why, does a vision-language model use the image, or ignore it?

>>> import mechvlm as mv
>>> vlm = mv.load("demo")
>>> real = vlm.prompt(mv.demo.scenes()[0].image, "Is there a 7 in the image?")
>>> null = real.with_image(mv.images.black)
"""

from mechvlm import images as images
from mechvlm.attention import mass as mass
from mechvlm.attention import rows as rows
from mechvlm.edits import Edit as Edit
from mechvlm.edits import ablate_heads as ablate_heads
from mechvlm.edits import bias_attention as bias_attention
from mechvlm.edits import cut_attention as cut_attention
from mechvlm.edits import patch as patch
from mechvlm.edits import replace_span as replace_span
from mechvlm.edits import scale_heads as scale_heads
from mechvlm.edits import steer as steer
from mechvlm.load import load as load
from mechvlm.metrics import log_probability as log_probability
from mechvlm.metrics import logit_difference as logit_difference
from mechvlm.metrics import probability as probability
from mechvlm.prompt import ImageMap as ImageMap
from mechvlm.prompt import Prompt as Prompt
from mechvlm.run import Generation as Generation
from mechvlm.run import Run as Run
from mechvlm.sites import Site as Site
from mechvlm.vlm import VLM as VLM

__version__ = "0.1.0"
