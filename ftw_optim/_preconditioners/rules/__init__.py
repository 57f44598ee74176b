"""One registered function for each optimizer whose map is known: its state read in, its ``P`` given back.

May import the modules of ``_preconditioners`` beside this folder. To add an optimizer, add a function to the file of
its kin, or a file, named below.
"""

from ftw_optim._preconditioners.rules import accumulators as accumulators
from ftw_optim._preconditioners.rules import adafactor as adafactor
from ftw_optim._preconditioners.rules import adam as adam
from ftw_optim._preconditioners.rules import low_bit as low_bit
from ftw_optim._preconditioners.rules import matrices as matrices
from ftw_optim._preconditioners.rules import norms as norms
from ftw_optim._preconditioners.rules import sgd as sgd
from ftw_optim._preconditioners.rules import signs as signs
