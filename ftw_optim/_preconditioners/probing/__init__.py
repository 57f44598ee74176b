"""Probing: the preconditioner of an optimizer that no rule knows, read from trial steps on a copy.

``trial.py`` makes the copy and steps it; ``probe.py`` reads the map from two such steps and refuses optimizers for
which that is not possible. May import the modules beside this folder except ``lookup.py``. Change it where an optimizer
cannot be copied, or its map cannot be read.
"""
