"""From a model and its losses to the factors of every candidate's gradient: one forward and one backward pass.

``capture.py`` is the pass; the other modules tell which module owns a parameter, which axis is the candidates', what
a backward pass to the layers' outputs finds, and whether all of that is true. ``replay/`` runs a module again where
no rule knows it. This room may import ``_layers`` and ``_factors``. Change it for another way to train (a kind of
checkpointing, a compiler) or another way to lay out candidates; a new kind of layer is a file in ``_layers``.
"""
