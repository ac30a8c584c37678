"""The global scheme: weights of a whole data set, renewed now and then, held in between.

S is the worst-off alpha-fraction of all N samples, and every sample's weight is known before its
batch is drawn. So the weights can scale the gradients (reweighting) or be the distribution that
batches are drawn from (resampling). Source: arXiv 2411.03068; measurements: ``docs/schemes.md``.
"""

from irw_optim.schemes.global_scheme import GlobalScheme
from irw_optim.schemes.global_weights import ClassByClassSampler, global_weights
from irw_optim.schemes.reading import IndexedDataset
from irw_optim.schemes.resampling import ResamplingSampler

__all__ = [
    "ClassByClassSampler",
    "GlobalScheme",
    "IndexedDataset",
    "ResamplingSampler",
    "global_weights",
]
