"""Integrations with training frameworks: one module for each, which needs the extra that it is named after.

``transformers``, ``trl``, ``lightning``, ``accelerate``; ``streaming`` feeds any of them. ``_trainers/`` holds the
parts that several share. May import all other packages of the library, none of which imports this one. To add a
framework, copy ``trl/sft.py``.
"""
