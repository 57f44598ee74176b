"""Which model families of Transformers are right, and which are refused by name?

``benchmarks/families.py`` is the command; here is what it runs, a file for each part:

- ``command``: the options, a process for each family, the table.
- ``configs``: small configurations, from the defaults and the names of their sizes.
- ``models``: the families, a model of each, its batches and losses.
- ``check``: one cell: what a step gives, against autograd on one row at a time.

Imports within the folder are relative; what benchmarks share (``machine``) lies beside the command, whose folder is on
the path when it runs.
"""
