"""The Gram matrix and the inner products with the target, from factors, target gradient and preconditioner.

``exact.py`` adds up inner products parameter by parameter, ``sketch.py`` estimates them; ``ways.py`` chooses the
cheapest way for each parameter. May import ``_preconditioners`` (the forms of ``P``) and ``_factors``. Change it for a
new metric, a new way to the same numbers, or a new estimate. It never sees a model; its results are the input of
``_matching``.
"""
