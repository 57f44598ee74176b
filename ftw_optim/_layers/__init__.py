"""Layer rules: how the gradient of one kind of layer factorizes, one registered function for each kind."""

from ftw_optim._layers import attention as attention
from ftw_optim._layers import convolution as convolution
from ftw_optim._layers import embedding as embedding
from ftw_optim._layers import linear as linear
from ftw_optim._layers import norm as norm
