"""From the question whether to reweight at all to a decision on one's own data, in one call.

`compare_remedies` trains plainly and with every remedy, over a few seeds, and says what to take and
how sure that is. A remedy is a function of a `Training` that returns a trained model, so that one's
own takes part as well.
"""

from irw_optim.remedies._compare import compare_remedies as compare_remedies
from irw_optim.remedies._comparison import Comparison, Difference
from irw_optim.remedies._training import REMEDIES as REMEDIES
from irw_optim.remedies._training import Fitted, Recipe, Remedy, Training

__all__ = [
    "Comparison",
    "Difference",
    "Fitted",
    "Recipe",
    "Remedy",
    "Training",
]
