"""IRW as estimators of scikit-learn: an `IRWOptimizer` inside a skorch net, behind fit and predict.

The extra ``sklearn`` has what it needs: ``pip install "irw-optim[sklearn]"``.
"""

try:
    import skorch  # noqa: F401
except ImportError as error:
    raise ImportError('irw_optim.sklearn needs skorch: pip install "irw-optim[sklearn]"') from error

from irw_optim.sklearn._estimators import IRWClassifier, IRWRegressor
from irw_optim.sklearn._net import mlp

__all__ = ["IRWClassifier", "IRWRegressor", "mlp"]
