"""The set-up of the paper, with what its tables leave out.

``benchmarks/paper.py`` is the command; here is what it adds to ``pays.py``, which runs the arms:

- ``command``: its options, the arms of the paper's tables, and the table.
- ``sources``: data sets of the hub as records, and local files in their place.
- ``scoring``: accuracy of multiple choice, F1 of answers, with worked examples in front of the question.
"""
