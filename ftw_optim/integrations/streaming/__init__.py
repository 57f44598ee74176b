"""Candidates from interleaved streams, and targets in cycles: resumed without losing a sample or serving one twice.

``_stream.py`` makes items, ``_interleaving.py`` mixes sources, ``_records.py`` reads them, ``_cursor.py`` holds the
position in each, ``_screening.py`` encodes records and counts the skipped ones, ``_proposing.py`` lets a proposal
choose among samples read ahead, ``_shares.py`` lets sources be drawn by their weight. Needs no model. To add a kind of
source, add a reader to ``_records.py``.
"""

from ftw_optim.integrations.streaming._shares import LearnedShares as LearnedShares
from ftw_optim.integrations.streaming._stream import CandidateStream as CandidateStream
from ftw_optim.integrations.streaming._target_cycle import TargetCycle as TargetCycle
from ftw_optim.integrations.streaming._target_cycle import pad as pad
