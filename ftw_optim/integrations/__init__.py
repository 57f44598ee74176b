"""At home in training frameworks: one module a framework, each needs the extra that it is named after.

``transformers``, ``trl``, ``lightning``, ``accelerate``; ``streaming`` feeds any of them. ``_trainers/`` holds the
parts that several share. May import everything below; nothing in the package imports this room. To add a framework,
copy ``trl.py``.
"""
