"""Replay: exact gradients of layers that no rule knows, by running the module again on its recorded inputs.

``calls.py`` records a call, ``axes.py`` finds the candidates in it, ``fallback.py`` runs it again, candidate by
candidate. May import ``_layers``. Change it where a module that is run again returns something else the second time.
"""
