"""For processes that tests start, what `conftest.py` does in its own: PyPI's torchvision under a CPU build of torch."""

import sys


class Shim:
    """Defines, before torchvision is imported, the two operators that it misses."""

    def find_spec(self, name, _path=None, _target=None):
        """Nothing is found here; the import goes on as it would."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda:  # of one build with torchvision, which then brings its operators
                return
            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


SHIM = Shim()  # which has to live as long as the process
sys.meta_path.insert(0, SHIM)
