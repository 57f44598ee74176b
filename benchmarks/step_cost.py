"""The cost of a selective step, relative to a plain AdamW step on the same candidates, and where the time goes.

    python benchmarks/step_cost.py                 # the points with a goal, about 20 minutes on 2 cores
    python benchmarks/step_cost.py --grid          # all ways over n, t, width, LoRA and scored share: as long
    python benchmarks/step_cost.py --cases         # checkpointing, bfloat16, LoRA, Llama and Qwen3: minutes
    python benchmarks/step_cost.py --launches      # operations and Python calls of small steps: 15 minutes on 1 core
    python benchmarks/step_cost.py --quick         # small points, seconds; their figures mean nothing
    python benchmarks/step_cost.py --device cuda --only Qwen3-0.6B

All arms of a point run interleaved in one process, each on its own copy of the same model; reported are medians and
quartiles of ratios, round by round, to the plain step. The floor is arithmetic that no implementation of the method can
leave out (``Point.floor``). The points of the first table also run in a process whose allocator keeps freed pages. The
Gram matrix is compared with float64. ``--out`` keeps ``step_cost.json`` (raw numbers, machine), ``step_cost.txt`` and,
where their points were measured, ``step_cost_t.png`` and ``step_cost_n.png``.

``--launches`` counts operations and Python calls of small steps, on one thread, beside AdamW as a for-loop and with
``foreach=True``, and compares the ways to the Gram matrix there. With ``--grid`` it measures wide models and long
contexts too, with ``--only`` any point of that grid. ``--out`` keeps ``launches.txt``.
"""

# From step_cost/: of a folder with an __init__.py and a file of the same name, Python imports the folder.
from step_cost.command import main

if __name__ == "__main__":
    main(description=__doc__)
