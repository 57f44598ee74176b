"""Does selecting beat training on everything, when a mixed stream is used to get better at one target?

``benchmarks/finetune.py`` is the command; here is what it runs, a file for each part:

- ``command``: the options, the order of the runs, and what is put into the report.
- ``corpus``, ``records``: the embedded text; any records as a stream, as examples and as batches.
- ``models``: the model that is tuned, from disk or the hub, or a small GPT made on the spot.
- ``arms``: the ways of training that are compared, and the loop that runs them side by side.
- ``report``: the table, ``results.json`` and the picture.

Imports within the folder are relative; what benchmarks share (``machine``) lies beside the command, whose folder is on
the path when it runs.
"""
