"""Which model families of Transformers are right, and which are refused by name?

    python benchmarks/families.py                                  # all of them, about 12 minutes on one core
    python benchmarks/families.py --families llama qwen3_next t5   # some
    python benchmarks/families.py --ways factors --out results

Every causal, masked and encoder-decoder language model of Transformers' mappings, and every classifying encoder, is
built small with random weights. It makes two steps, on batches of four rows of different padding. The gradient of
each row that a step takes, their Gram matrix and the combined gradient are compared with autograd on one row at a
time. All parameters are trained in float32, or LoRA on all linear layers of a bfloat16 model.
"""

# From families/: of a folder with an __init__.py and a file of the same name, Python imports the folder.
from families.command import main

if __name__ == "__main__":
    main(description=__doc__)
