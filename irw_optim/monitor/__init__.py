"""What a training with `IRWOptimizer` does: recorded, shown, and diagnosed.

See `IRWMonitor`. Nothing here changes the training.
"""

from irw_optim.monitor.monitor import IRWMonitor
from irw_optim.monitor.signatures import Finding

__all__ = ["Finding", "IRWMonitor"]
