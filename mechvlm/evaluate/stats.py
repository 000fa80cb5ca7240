"""Statistics of answers: how good, how sure, how large a difference, and is it more than another threshold?

Of answers: `scores`, `brier`, `reliability`, `calibration`, `expected_calibration_error`. Of two models: `compare` and
`comparison_table`, which hold all the rest; `mcnemar`, `paired_bootstrap`, `beta_paired`, `beta_independent`. Of the
threshold: `threshold_sweep`, `matched_shift`, `matched_baseline`. Of effects: `cohens_h`, `cohens_d`, `power`,
`required_n`. Of items: `first_asked`, which leaves out what is asked again. Of many tests: `associate`,
`benjamini_hochberg`, `max_statistic`.

Rule this module guards: intervals are over clusters, such as pictures, wherever they are given.

>>> round(cohens_h(0.8458, 0.8483), 5)
0.00695
"""

from mechvlm.evaluate.association import associate
from mechvlm.evaluate.calibration import calibration, expected_calibration_error, reliability
from mechvlm.evaluate.comparison import compare
from mechvlm.evaluate.corrections import benjamini_hochberg, max_statistic
from mechvlm.evaluate.effects import cohens_d, cohens_h, power, required_n
from mechvlm.evaluate.items import first_asked
from mechvlm.evaluate.paired import Difference, McNemar, mcnemar, paired_bootstrap
from mechvlm.evaluate.posteriors import Posterior, beta_independent, beta_paired
from mechvlm.evaluate.scoring import brier, scores
from mechvlm.evaluate.tables import comparison_table
from mechvlm.evaluate.thresholds import matched_baseline, matched_shift, threshold_sweep

__all__ = [
    "Difference",
    "McNemar",
    "Posterior",
    "associate",
    "benjamini_hochberg",
    "beta_independent",
    "beta_paired",
    "brier",
    "calibration",
    "cohens_d",
    "cohens_h",
    "compare",
    "comparison_table",
    "expected_calibration_error",
    "first_asked",
    "matched_baseline",
    "matched_shift",
    "max_statistic",
    "mcnemar",
    "paired_bootstrap",
    "power",
    "reliability",
    "required_n",
    "scores",
    "threshold_sweep",
]
