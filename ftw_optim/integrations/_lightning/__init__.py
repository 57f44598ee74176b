"""Parts of the Lightning integration: the callback that wraps the optimizer, the halves of a step, what is refused.

May import ``_trainers/`` and every package of the library. Change it for what Lightning calls, and when.
"""
