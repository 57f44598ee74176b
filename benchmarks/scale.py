"""What does one selection over many processes cost, and how does that grow with their number?

    torchrun --nproc-per-node 2 benchmarks/scale.py [--quick] [--device cuda]   # measured, beside plain DDP
    python benchmarks/scale.py --simulate                                       # counted, and a model of the rest

Measured: the time of a step beside that of DistributedDataParallel on the same candidates, interleaved; medians and
quartiles, the milliseconds of each phase, and that parameters are equal on all ranks. Counted: the bytes that a rank
sends in a step at 8, 64 and 1024 ranks, from a step that runs as the first of so many, beside the formulas. The model
adds times to these bytes, from the speeds that are given or measured here; it prints what it assumes.
"""

# From scale/: of a folder with an __init__.py and a file of the same name, Python imports the folder.
from scale.command import main

if __name__ == "__main__":
    main(description=__doc__.splitlines()[0])
