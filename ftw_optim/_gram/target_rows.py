"""The products of a step in which target rows take part: what the target asks for, estimated from the other rows.

The mean gradient of the target rows contains each of them, and the fit to it would be these rows and nothing else. The
gradient to be matched is that of the distribution they are drawn from. A candidate's product with it is estimated by
its mean product with the target rows, a target row's by that with the *other* ones: neither is biased.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ftw_optim._gram.inner_products import Products

ENERGY_FLOOR = 0.01
"""The least target energy, beside the mean square of the target rows: pairs that disagree may sum to less than zero."""


def leaving_one_out(products: Products, targets: int, *, remembered: float) -> Products:
    """The products with ``cross_gram``, its standard error and the target energy estimated from the target rows.

    Args:
        products: of ``n`` candidates and ``m`` target rows behind them. Their ``cross_gram`` and ``target_energy`` are
            those of the remembered gradient, if there is one.
        targets: ``m``, at least 2.
        remembered: the share of a remembered gradient in the target; 0: there is none.

    Returns:
        ``cross_gram`` ``(n + m,)``: ``remembered`` times the product with the remembered gradient, and the rest times
        the mean product with the target rows, each target row without itself. ``cross_gram_error``: the standard error
        of the latter over the target rows, zero for these. ``target_energy``: that of the same mixture, from pairs of
        different target rows.
    """
    gram = products.gram.double()
    n, new = len(gram) - targets, 1.0 - remembered
    columns = gram[:, n:]
    fresh = columns.mean(dim=1)
    own = columns[n:].diagonal()
    fresh[n:] = (columns[n:].sum(dim=1) - own) / (targets - 1)
    error = torch.zeros_like(fresh)
    if n:
        error[:n] = new * columns[:n].std(dim=1) / targets**0.5
    pairs = (columns[n:].sum() - own.sum()) / (targets * (targets - 1))
    energy = new**2 * pairs
    cross_gram = new * fresh
    if remembered:
        old = products.cross_gram.double()
        cross_gram = cross_gram + remembered * old
        energy = energy + remembered**2 * products.target_energy.double() + 2 * remembered * new * old[n:].mean()
    return replace(
        products,
        cross_gram=cross_gram.to(products.cross_gram),
        cross_gram_error=error.to(products.cross_gram),
        target_energy=torch.maximum(energy, ENERGY_FLOOR * own.mean()).to(products.target_energy),
    )
