"""The report: one question about one picture, looked at from all sides, as a page that stands alone.

Rule this package guards: nothing is left out silently. A part that cannot be made says why in its place.

`study` is what is being asked; `views` and `causes` measure and draw it, a section each; `page` makes HTML of sections.

>>> report(vlm, real, real.with_image(mv.images.black), out="report")
PosixPath('report/report.html')
"""

from mechvlm.report.study import Case as Case
from mechvlm.report.study import Study as Study
from mechvlm.report.write import report as report
