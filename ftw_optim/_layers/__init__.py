"""Layer rules: one registered function for each kind of layer, which gives its gradients in factorized form.

A rule takes a layer's inputs and output gradients and returns :class:`~ftw_optim.Factors`; ``registry.py`` finds the
rule of a module. May import only ``_factors``. To add a kind of layer, add a file beside ``linear.py`` and name it
below.
"""

from ftw_optim._layers import attention as attention
from ftw_optim._layers import convolution as convolution
from ftw_optim._layers import embedding as embedding
from ftw_optim._layers import linear as linear
from ftw_optim._layers import norm as norm
