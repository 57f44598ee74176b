"""Does selection pay, in seconds, on a real pretrained model?

``benchmarks/pays.py`` is the command; here is what it runs, a file for each part:

- ``command``: the options, and the order of the runs.
- ``setting``: the records of a comparison: stream, target, validation, test, held-out pool.
- ``split``: a causal language model in two: a frozen trunk, whose hidden states are kept, and the trained blocks.
- ``arms``: the ways of training, an entry each. A new one is a line there.
- ``peers``: published selectors of others, and controls, as filter and weight stages.
- ``damage``: ways in which records of the stream are spoiled.
- ``proposals``: which of the records read become candidates.
- ``training``: one run of one arm, its clock and its evaluations.
- ``store``: a file for each run, so that a killed comparison goes on where it stopped.
- ``report``: paired differences with their intervals, and the table.

Imports within the folder are relative; what benchmarks share (``finetune.records``, ``machine``, ``pretrained``) lies
beside the command, whose folder is on the path when it runs.
"""
