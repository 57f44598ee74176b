"""The stages of one step in their order, and everything that lasts from one step to the next.

``optimizer.py`` holds :class:`SelectiveOptimizer`; each other module is one stage of a step: the closures, the target
gradient, the pass over the candidates, the choice among them, and the combined gradient. This package may import every
package below it (capture, gram, matching, layers, preconditioners, factors); none of them imports this one. Change it
for the order of a step, what a closure may return, where the combined gradient comes from, or what a checkpoint holds.
"""
