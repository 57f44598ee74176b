"""What does each way of choosing data make of MMLU and TyDiQA, with a budget of one record in twenty?

Run: python benchmarks/paper.py --task mmlu --model meta-llama/Llama-3.2-1B --device cuda --out FOLDER
     python benchmarks/paper.py --task tydiqa --model Qwen/Qwen3-0.6B --device cuda --out FOLDER
     python benchmarks/paper.py --quick --out FOLDER      (a minute, a tiny random model, no download)

The set-up of Filter-then-Weight (arXiv 2604.00001), as far as its public copies tell it: LoRA on all layers, a stream
of an instruction mixture, of which each step keeps one record in twenty; full data, random, GRAD-MATCH, TracIn, LESS
and GREATS beside it. And what its tables leave out: the model before training, the target examples alone, these with
random records, with similar and with learned ones. MMLU is scored by the most likely choice after five worked examples,
TyDiQA by the F1 of the answer after one; intervals are of a bootstrap over test questions and seeds.

It needs a GPU and the data sets of a hub, and has never run there: here the same code ran on SmolLM2-135M, on tiny
models, and on local files (--pool, --target, --test) in the form that pays.py reads, with the field choices for MMLU.
"""

# From paper/: of a folder with an __init__.py and a file of the same name, Python imports the folder.
from paper.command import main

if __name__ == "__main__":
    main(description=__doc__.splitlines()[0])
