"""The small problem between the two halves of the library: filter stage, weight stage, their solver, and the outcome.

All of it works on an ``(n, n)`` matrix on the CPU; it never sees a model, a parameter or an optimizer, and imports
nothing of the package. To add a filter stage copy ``TopKFilter`` in ``filters.py``, to add a weight stage
``UniformWeights`` in ``weights.py``; both are public interfaces, so a stage may as well live in your own code.
"""
