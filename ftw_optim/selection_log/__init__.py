"""The selection log: offered and kept candidates with their weights at every step, on disk, safe if a run is killed.

``_log.py`` records selections and reads a run back; ``_store.py`` writes and cuts the files; ``_cost.py`` adds up what
the selections of a run cost; ``_whole_file.py`` serves all who write a file at once. May import ``_matching`` for the
selection it records. To add a column, change ``_log.py``; to add a file format, ``_store.py``.
"""

from ftw_optim.selection_log._cost import Cost as Cost
from ftw_optim.selection_log._cost import cost_of as cost_of
from ftw_optim.selection_log._log import LoggedRun as LoggedRun
from ftw_optim.selection_log._log import SelectionLog as SelectionLog
from ftw_optim.selection_log._log import read_log as read_log
