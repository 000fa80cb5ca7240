"""Benchmarks and honest statistics: is it right, how sure is that, and is a difference more than another threshold?

`mv.evaluate.pope` answers the questions of a POPE file; `mv.evaluate.stats` says what the answers show. Values of each
item are kept, and intervals are over pictures, since questions about one picture are not independent.

>>> found = mv.evaluate.pope(vlm, mv.evaluate.read_pope("demo", split="adversarial")[:12])
>>> float(found.correct.mean()), len(set(found.image.values))
(1.0, 2)
"""

from mechvlm.evaluate import stats as stats
from mechvlm.evaluate.edit_texts import EditTexts as EditTexts
from mechvlm.evaluate.edit_texts import edits_from as edits_from
from mechvlm.evaluate.evaluation import pope as pope
from mechvlm.evaluate.files import Item as Item
from mechvlm.evaluate.files import read_pope as read_pope
from mechvlm.evaluate.parsers import PARSERS as PARSERS
from mechvlm.evaluate.task import TEMPLATES as TEMPLATES
