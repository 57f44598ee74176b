"""The small matching problem: filter stage, weight stage, their solver, and the outcome of a selection.

All of it works on an ``(n, n)`` matrix on the CPU; it never sees a model, a parameter or an optimizer, and imports
nothing of the library. ``problem.py`` says what a stage is given. ``active_set.py`` is the solver: the greedy filter
and the weights both grow an active set; ``nnls.py`` is the solver alone, as a function. The solver's rules see a system
without units (``scaled_system.py``) through an interface (``elimination.py``), whose arithmetic runs in lists of floats
for small problems and in tensors for large ones. To add a filter stage, copy ``TopKFilter`` in ``filters.py``; to add a
weight stage, copy ``UniformWeights`` in ``weights.py``. Both are public interfaces, so a stage may also live in your
own code.
"""
