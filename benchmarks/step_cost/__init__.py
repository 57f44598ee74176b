"""The cost of a selective step, relative to a plain AdamW step on the same candidates, and where the time goes.

``benchmarks/step_cost.py`` is the command; here is what it runs, a file for each part:

- ``command``: the options, the order of the points, and what is kept of them.
- ``points``: what is measured, the floor of each point, and the goals.
- ``arms``: the model of a point, its batches, a plain step and a selective one.
- ``measure``: interleaved times and memory, in this process or in a fresh one; ``phases``: where the time goes.
- ``launches``: how many operations and Python calls a step makes, and its time where they are small.
- ``grams``: the error of the Gram matrix, and the other ways to the same one.
- ``goals``, ``report``, ``charts``: what the results come to, as verdicts, tables and pictures.

Imports within the folder are relative; what benchmarks share (``machine``, ``memory``) lies beside the command, whose
folder is on the path when it runs.
"""
