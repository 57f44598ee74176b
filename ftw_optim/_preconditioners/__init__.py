"""Preconditioners: the positive map ``P`` of the inner optimizer's next update, read from its live state.

``maps.py`` holds the forms of ``P``; ``lookup.py`` finds the ``P`` of a parameter, by a rule of ``rules/`` or by
``probing/``. Of the other packages it imports the states of generators in ``_layers`` alone. To add an optimizer, add
a rule; to add a form of ``P``, add a class to ``maps.py``.
"""

from ftw_optim._preconditioners import rules as rules
