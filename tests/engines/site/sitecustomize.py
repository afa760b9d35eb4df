"""For a torchvision built for CUDA, as PyPI's is, beside a torch for CPUs: its operators exist as imports ask."""

import importlib.abc
import importlib.metadata
import sys

_KEPT = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and "+cpu" not in importlib.metadata.version("torchvision"):
                library = torch.library.Library("torchvision", "FRAGMENT")
                _KEPT.append(library)  # its definitions live as long as it does
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
