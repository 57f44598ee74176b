"""A module run again from what one call of it was given: exact gradients of layers that no rule knows.

``calls.py`` remembers a call, ``axes.py`` finds the candidates in it, ``fallback.py`` runs it again, candidate by
candidate. May import ``_layers``. Change it where a module of the kind that is run again gives something else the
second time.
"""
