"""Benchmarks and honest statistics: is it right, how sure is that, and is a difference more than another threshold?

`mv.evaluate.pope` answers the questions of a POPE file; `mv.evaluate.stats` says what the answers show. Values of each
item are kept, and intervals are over pictures, since questions about one picture are not independent.
"""

from mechvlm.evaluate import stats as stats
