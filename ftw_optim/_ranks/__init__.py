"""Several processes that make one selection: what they tell each other, and what stands around their model.

``ranks.py`` is all communication there is: objects, sums and exchanges, over the groups of ``process_groups.py``.
``grouping.py`` says how many ranks make one selection. ``wrapping.py`` knows DDP and FSDP2, and refuses what cannot be
right. ``owners.py`` deals the parameters out: each rank sends its own candidates' gradients of a parameter to the rank
that owns it, which then has those of all. Where each rank holds a part of every parameter, ``shards.py`` brings the
owner the other parts, and those of the optimizer's state, and ``scattering.py`` leaves each rank its part of the
combined gradient.
"""
