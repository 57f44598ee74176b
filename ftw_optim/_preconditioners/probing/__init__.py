"""The map of an optimizer that no rule knows: steps tried on a copy, and what they tell.

``trial.py`` makes the copy and steps it; ``probe.py`` reads the map from two such steps and refuses what they cannot
tell. May import the modules beside this folder but ``lookup.py``. Change it where an optimizer cannot be copied or
told.
"""
