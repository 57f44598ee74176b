"""One page about a run: which candidates were picked, with which weights, how useful they were, and what it cost.

``python -m ftw_optim.report RUN [--out page.html] [--title TITLE]`` reads the log that a
:class:`~ftw_optim.selection_log.SelectionLog` wrote into ``RUN`` (or a folder of it) and writes one HTML file that
needs no script and no network. ``python -m ftw_optim.report --demo`` makes a small run on generated data first.

``_data.py`` turns the log into numbers (``_samples.py`` those of each sample), ``_charts.py`` into drawings,
``_page.py`` into the page. ``_mixture.py`` writes what others take from it: shares of sources, records by weight. These
may import ``selection_log``; ``_demo.py`` makes the demonstration's run, with ``_step``. To add a section, add its
numbers to ``_data.py`` and its place to ``_page.py``.
"""

from ftw_optim.report._page import page as page
