"""The parts of ``scale.py``: ``command.py`` is its command line and what it measures under ``torchrun``, ``counted.py``
the bytes of a step that pretends to be one of many ranks, ``model.py`` the times that follow from these.
"""
