"""How the groups fare, and how the tail: metrics of a trained model, on arrays or tensors.

The groups' labels are needed here, in evaluation, only::

    accuracy = group_accuracy(y_true, y_pred, {"race": race, "sex": sex})
    worst_group_accuracy = min(accuracy)            mad = max(accuracy) - min(accuracy)
    tad = sum(|accuracy - overall accuracy|)

    loss_variance = var(losses)                     worst_alpha_loss = mean(largest alpha of losses)

`group_report` is all of it as a table, and `worst_cluster_accuracy` what to select a model by where
nobody's group is known.
"""

from irw_optim.metrics._groups import (
    group_accuracy,
    loss_variance,
    mad,
    tad,
    worst_alpha_loss,
    worst_group_accuracy,
)
from irw_optim.metrics._reports import (
    Cell,
    ClusterAccuracy,
    GroupReport,
    group_report,
    worst_cell_accuracy,
    worst_cluster_accuracy,
)

__all__ = [
    "Cell",
    "ClusterAccuracy",
    "GroupReport",
    "group_accuracy",
    "group_report",
    "loss_variance",
    "mad",
    "tad",
    "worst_alpha_loss",
    "worst_cell_accuracy",
    "worst_cluster_accuracy",
    "worst_group_accuracy",
]
