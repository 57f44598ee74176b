"""One registered function for each known optimizer, which reads its state and returns its ``P``.

May import the modules of ``_preconditioners`` beside this folder. To add an optimizer, add a function to the file of
similar ones, or add a file and name it below.
"""

from ftw_optim._preconditioners.rules import accumulators as accumulators
from ftw_optim._preconditioners.rules import adafactor as adafactor
from ftw_optim._preconditioners.rules import adam as adam
from ftw_optim._preconditioners.rules import low_bit as low_bit
from ftw_optim._preconditioners.rules import matrices as matrices
from ftw_optim._preconditioners.rules import norms as norms
from ftw_optim._preconditioners.rules import sgd as sgd
from ftw_optim._preconditioners.rules import signs as signs
