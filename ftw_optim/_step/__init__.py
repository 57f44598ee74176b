"""One step in its order, and everything that lasts from one step to the next.

``optimizer.py`` is what users hold; below it each module is one stage of a step: the closures, the target gradient,
the pass over the candidates, the decision about them, and the combined gradient. This room may import every room
below it (capture, gram, matching, layers, preconditioners, factors); none of them imports this one. To change the
order of a step, what a closure may return, where the combined gradient comes from or what a checkpoint holds, change
it here.
"""
