"""Training in several processes: the step of one process on the batch of all of them.

The rows of G are spread: each product is one of every process with its own, and a collective.
"""
