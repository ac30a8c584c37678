"""What a training with `IRWOptimizer` does: recorded, shown, and diagnosed.

See `IRWMonitor`. Nothing here changes the training.
"""

from irw_optim.monitor.findings import Finding
from irw_optim.monitor.monitor import IRWMonitor

__all__ = ["Finding", "IRWMonitor"]
