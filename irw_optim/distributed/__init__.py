"""Training in several processes: the step of one process on the batch of all of them.

IRW on a batch is three products with G (B x P). Over processes the rows of G are spread, and each
product is a product of every process with its own rows, and one collective::

    losses   all-gathered         B numbers        S, on every process the same
    g_S      all-reduced          P numbers        combine
    scores   all-gathered         B numbers        dot

The rule that chooses the weights is that of one process: it is handed the losses and the rows of
all processes, and each keeps the weights of its own samples. What sums the gradient up is
DistributedDataParallel (`replicas`) or FSDP2 (`shards`), as in every training.
"""
