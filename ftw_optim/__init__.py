"""Per-step data selection inside any adaptive optimizer."""

from ftw_optim._active_set import WeightSolution as WeightSolution
from ftw_optim._factors import Factors as Factors
from ftw_optim._filters import FilterStage as FilterStage
from ftw_optim._filters import GreedyFilter as GreedyFilter
from ftw_optim._filters import KeepAll as KeepAll
from ftw_optim._filters import TopKFilter as TopKFilter
from ftw_optim._layers.coverage import Coverage as Coverage
from ftw_optim._layers.coverage import coverage as coverage
from ftw_optim._layers.registry import register_layer as register_layer
from ftw_optim._linalg import solve_nnls as solve_nnls
from ftw_optim._losses import count_label_tokens as count_label_tokens
from ftw_optim._losses import token_losses as token_losses
from ftw_optim._matching import Matching as Matching
from ftw_optim._matching import Selection as Selection
from ftw_optim._optimizer import SelectiveOptimizer as SelectiveOptimizer
from ftw_optim._preconditioners.lookup import preconditioner_of as preconditioner_of
from ftw_optim._preconditioners.maps import Diagonal as Diagonal
from ftw_optim._preconditioners.maps import Kronecker as Kronecker
from ftw_optim._preconditioners.maps import Preconditioner as Preconditioner
from ftw_optim._preconditioners.maps import RankOne as RankOne
from ftw_optim._preconditioners.maps import RotatedDiagonal as RotatedDiagonal
from ftw_optim._preconditioners.maps import Scalar as Scalar
from ftw_optim._preconditioners.registry import register_preconditioner as register_preconditioner
from ftw_optim._scored import last_blocks as last_blocks
from ftw_optim._sketch import Sketch as Sketch
from ftw_optim._target import TargetGradient as TargetGradient
from ftw_optim._weights import NonNegativeLeastSquares as NonNegativeLeastSquares
from ftw_optim._weights import UniformWeights as UniformWeights
from ftw_optim._weights import WeightStage as WeightStage

__version__ = "0.1.0"
