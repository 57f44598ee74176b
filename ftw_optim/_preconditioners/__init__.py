"""Preconditioners: the positive map ``P`` of the inner optimizer's next update, read from its state."""

from ftw_optim._preconditioners import accumulators as accumulators
from ftw_optim._preconditioners import adafactor as adafactor
from ftw_optim._preconditioners import adam as adam
from ftw_optim._preconditioners import low_bit as low_bit
from ftw_optim._preconditioners import matrices as matrices
from ftw_optim._preconditioners import norms as norms
from ftw_optim._preconditioners import sgd as sgd
from ftw_optim._preconditioners import signs as signs
