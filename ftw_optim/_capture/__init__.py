"""Capture: the factors of every candidate's gradient, from one forward and one backward pass over the model.

``capture.py`` is the pass. The other modules find which module owns a parameter and which axis is the candidates',
run the backward pass to the layers' outputs, and check the result. ``replay/`` runs a module again where no rule knows
it. This package may import ``_layers`` and ``_factors``. Change it for another way to train (a kind of checkpointing, a
compiler) or another way to lay out candidates; a new kind of layer is a file in ``_layers``.
"""
