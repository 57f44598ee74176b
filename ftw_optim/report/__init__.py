"""One page about a run: which candidates were picked, with which weights, how useful they were, and what it cost.

``python -m ftw_optim.report RUN [--out page.html] [--title TITLE]`` reads the log that a
:class:`~ftw_optim.selection_log.SelectionLog` wrote into ``RUN`` (or a folder of it) and writes one HTML file that
needs no script and no network.

``_data.py`` turns the log into numbers, ``_charts.py`` into drawings, ``_page.py`` into the page. May import
``selection_log``. To add a section, add its numbers to ``_data.py`` and its place to ``_page.py``.
"""

from ftw_optim.report._page import page as page
