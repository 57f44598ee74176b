"""The parts of ``lens.py``, which says what it measures.

``ways.py``: the ways of making a step, as weights on rows whose products are known. ``products.py``: these products,
from a model. ``command.py``: the command line, the table and the verdict.
"""
