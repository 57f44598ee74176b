"""Factorized gradients: layers produce them; the Gram matrix and the combined gradient are formed from them.

Everything that flows between capture and the Gram matrix is a list of :class:`~ftw_optim.Factors` for each parameter.
It is the lowest package and imports nothing of the library. Change it for a new storage of factors, or a new operation
on them.
"""
