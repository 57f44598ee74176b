"""Factors, target gradient and preconditioner to the small matching problem: the Gram matrix and its kin.

``exact.py`` adds up inner products parameter by parameter, ``sketch.py`` estimates them; ``ways.py`` chooses the
cheapest way for each parameter. May import ``_preconditioners`` (the forms of ``P``) and ``_factors``. Change it for
a new metric, a new way to the same number, or a new estimate. It never sees a model, and ends where ``_matching``
begins.
"""
