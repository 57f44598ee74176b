"""One page about a run: which candidates were picked, with which weights, how useful they were, and what it cost.

``python -m ftw_optim.report RUN [--out page.html] [--title TITLE]`` reads the log that a
:class:`~ftw_optim.selection_log.SelectionLog` wrote into ``RUN`` (or a folder of it) and writes one HTML file that
needs nothing else: no script, no network.
"""

from ftw_optim.report._page import page as page
