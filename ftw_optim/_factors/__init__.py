"""Factorized gradients: what layers give, and what the Gram matrix and the combined gradient are made of.

Everything that flows between capture and the Gram matrix is a list of :class:`~ftw_optim.Factors` for each parameter.
The ground floor: imports nothing of the package. Change it for a new storage of factors, or a new operation on them.
"""
