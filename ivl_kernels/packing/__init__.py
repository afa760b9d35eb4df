"""Many samples in one row: which ones (Select, Search, Pack, Maintain), and the row itself.

stream = PackedStream(Mixture([captions, documents], weights=[3, 1]), Limits(tokens=32768, tiles=96))
for samples in stream:
    model(**collate(samples))
"""

from .batch import Collator, Sample, collate, cut
from .isolation import isolation_problem
from .stream import Limits, Mixture, PackedStream, Packer

__all__ = [
    "Collator",
    "Limits",
    "Mixture",
    "PackedStream",
    "Packer",
    "Sample",
    "collate",
    "cut",
    "isolation_problem",
]
