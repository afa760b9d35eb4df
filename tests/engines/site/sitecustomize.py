"""For a torchvision built for CUDA, as PyPI's is, beside a torch for CPUs: its operators exist as imports ask."""

import importlib.abc
import importlib.metadata
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and "+cpu" not in importlib.metadata.version("torchvision"):
                self.library = torch.library.Library("torchvision", "DEF")
                self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sizes = "SymInt pooled_height, SymInt pooled_width"
                for kind, more in (("align", ", int sampling_ratio, bool aligned"), ("pool", "")):
                    result = "Tensor" if kind == "align" else "(Tensor, Tensor)"
                    self.library.define(
                        f"roi_{kind}(Tensor input, Tensor rois, float spatial_scale, {sizes}{more}) -> {result}"
                    )
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
