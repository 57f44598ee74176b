"""Does selecting beat training on everything, when a mixed stream is used to get better at one target?

``benchmarks/finetune.py`` is the command; here is what it adds to ``pays.py``, which runs the arms:

- ``command``: its few options, and what is passed on.
- ``corpus``: text that every machine has, as records.
- ``picture``: what the table says, as curves.

What benchmarks share (``pays``, ``pretrained``, ``machine``) lies beside the command, whose folder is on the path when
it runs.
"""
