"""Proposals: which of many records read are worth a pass through the model, and so become candidates.

``interface.py`` is what a proposal does, and the place to begin with one of your own. ``features.py`` describes
records without a model, ``drawing.py`` draws from them, so that a draw depends on the record and never on its place,
and ``contrast.py`` tells what is like the target from what is like the stream. ``scoring.py`` with ``regression.py``
learns scores, of which ``kinds.py`` and ``trust.py`` make what the vetted proposal goes by. ``uniform.py``,
``similarity.py``, ``learned.py`` and ``vetted.py`` hold one proposal each; ``stages.py`` has the filter and weights
that go with one that is not always trusted, and ``sampler.py`` brings one to a ``DataLoader``, over data whose features
``records.py`` keeps. Imports torch and, for stages and the selection that is observed, ``_matching``.
"""

from ftw_optim.proposals.interface import Proposal as Proposal
from ftw_optim.proposals.learned import LearnedProposal as LearnedProposal
from ftw_optim.proposals.sampler import ProposedSampler as ProposedSampler
from ftw_optim.proposals.similarity import SimilarityProposal as SimilarityProposal
from ftw_optim.proposals.stages import FilterUnless as FilterUnless
from ftw_optim.proposals.stages import WeightUnless as WeightUnless
from ftw_optim.proposals.uniform import UniformProposal as UniformProposal
from ftw_optim.proposals.vetted import VettedProposal as VettedProposal
