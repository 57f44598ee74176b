"""The stages of one step in their order, and everything that lasts from one step to the next.

``step.py`` holds the order of a step, and each stage has a module: ``target_rows.py`` (with ``target.py``),
``candidates.py``, ``gathering.py`` (with ``kept_factors.py`` and ``streamed_factors.py``), ``comparison.py``,
``choice.py`` and ``combine.py`` (with ``combine_shards.py``). Of several processes ``shared_factors.py``,
``shared_sums.py`` and ``choices.py`` make one selection; ``seen_pass.py`` is the pass that a rank makes along where
only others have rows. ``optimizer.py`` holds :class:`SelectiveOptimizer`, which has all that lasts from step to step;
``wrapper.py`` and ``checkpoint.py`` make it an optimizer that can be saved. What a step is made with stands in
``setup.py``, ``way.py``, ``parameters.py``, ``closures.py`` and ``clock.py``; ``options.py`` checks what users set.
``losses.py``, ``blocks.py`` and ``preconditioner_of.py`` hold functions for users.

This package may import every package below it (capture, gram, matching, layers, preconditioners, factors); none of them
imports this one. Change it for the order of a step, what a closure may return, where the combined gradient comes from,
or what a checkpoint holds.
"""
