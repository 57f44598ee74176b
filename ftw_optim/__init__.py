"""Per-step data selection inside any adaptive optimizer."""

from ftw_optim import _private_names as _private_names  # first: it says which of PyTorch's have moved

# isort: split
from ftw_optim._capture.coverage import Coverage as Coverage
from ftw_optim._capture.coverage import coverage as coverage
from ftw_optim._factors.factors import Factors as Factors
from ftw_optim._gram.sketch import Sketch as Sketch
from ftw_optim._layers.registry import register_layer as register_layer
from ftw_optim._matching.filters import AcceptFilter as AcceptFilter
from ftw_optim._matching.filters import FilterStage as FilterStage
from ftw_optim._matching.filters import GreedyFilter as GreedyFilter
from ftw_optim._matching.filters import KeepAll as KeepAll
from ftw_optim._matching.filters import TopKFilter as TopKFilter
from ftw_optim._matching.nnls import solve_nnls as solve_nnls
from ftw_optim._matching.problem import Matching as Matching
from ftw_optim._matching.selection import Selection as Selection
from ftw_optim._matching.solution import WeightSolution as WeightSolution
from ftw_optim._matching.weights import NonNegativeLeastSquares as NonNegativeLeastSquares
from ftw_optim._matching.weights import UniformWeights as UniformWeights
from ftw_optim._matching.weights import WeightStage as WeightStage
from ftw_optim._preconditioners.maps import Diagonal as Diagonal
from ftw_optim._preconditioners.maps import Kronecker as Kronecker
from ftw_optim._preconditioners.maps import Preconditioner as Preconditioner
from ftw_optim._preconditioners.maps import RankOne as RankOne
from ftw_optim._preconditioners.maps import RotatedDiagonal as RotatedDiagonal
from ftw_optim._preconditioners.maps import Scalar as Scalar
from ftw_optim._preconditioners.registry import register_preconditioner as register_preconditioner
from ftw_optim._step.blocks import last_blocks as last_blocks
from ftw_optim._step.blocks import spread_blocks as spread_blocks
from ftw_optim._step.losses import count_label_tokens as count_label_tokens
from ftw_optim._step.losses import token_losses as token_losses
from ftw_optim._step.optimizer import SelectiveOptimizer as SelectiveOptimizer
from ftw_optim._step.preconditioner_of import preconditioner_of as preconditioner_of
from ftw_optim._step.target import TargetGradient as TargetGradient

__version__ = "0.1.0"
