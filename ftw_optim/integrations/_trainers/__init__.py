"""Parts that the integrations of trainers share: the window of candidates, their weighting, targets, metrics, refusals.

May import every package of the library except the integrations themselves. Change it for what a trainer offers as
candidates, how tokens are counted, and what is refused before a run.
"""
