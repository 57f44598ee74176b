"""Would selection help, and which? How well each way of making a step agrees with held-out target rows.

Run: python benchmarks/lens.py --pool POOL --target TARGET --own-source PREFIX
     python benchmarks/lens.py --quick      (seconds, a tiny random model, no download)

Before training on anything, and once more after some steps on target rows and records like them: exact LoRA gradients
of a few hundred records are compared once, in the metric of an AdamW that is warm. Each way then draws steps from them,
at the price of a little arithmetic: agreement is the cosine of the step's combined gradient with the mean gradient of
target rows that no way has seen. Rows are what a step runs, of the pool and of the target.

The model is SmolLM2-135M-Instruct, as in pays.py, or any other of the Llama kind with --model.
"""

# From lens/: of a folder with an __init__.py and a file of the same name, Python imports the folder.
from lens.command import main

if __name__ == "__main__":
    main(description=__doc__.splitlines()[0])
