"""What a step costs on the models that people have: one entry an architecture, one command.

A model goes into the file of its family, as a class or a function and a line in its `ENTRIES`.
"""
