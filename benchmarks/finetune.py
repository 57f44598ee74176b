"""Does selecting beat training on everything, when a mixed stream is used to get better at one target?

Run: python benchmarks/finetune.py          (about 5 minutes on 2 cores; --quick is the short form)

What it compares, from the same weights and on the same stream: AdamW on a random k of the n candidates, on all n, and
on the target examples alone; SelectiveOptimizer(AdamW) that keeps k, and one that tilts all n with only the last block
scored. Each arm runs at its own best learning rate of a small grid, chosen on a part of the target that neither
training nor the test sees. A typical print-out; benchmarks/results holds its picture, and a second problem:

cpu, AMD EPYC, 2 threads, torch 2.13.0+cpu, commit f84db54-dirty
984,672 of 984,672 parameters trained, float32, no dropout; 50 steps, n = 16, k = 4
Records: target 109, validation 37, test 230; 83 skipped. Seeds: 2. Test loss at the start 4.980

                         best       test loss        gradients of         ms per beside AdamW, all n
arm                        lr    median  [range]      cand. target      s   step   loss steps      s
AdamW, random k        0.0001*  4.977 [4.977-4.978]   200      0    2.4     49  4.977     -      -
AdamW, all n            0.001*  4.926 [4.923-4.930]   800      0    5.2    105  4.926    50    5.2
AdamW, target alone    0.0003   4.909 [4.909-4.909]     0    800    5.2    105  4.909    22    2.4
Selective, keep k      0.0003   4.963 [4.963-4.964]   800    400   14.2    284  4.981     -      -
Selective, tilt all n   0.001*  4.971 [4.966-4.977]   800    100    7.3    145  4.992     -      -

lr: best of 0.0001, 0.0003, 0.001 on the validation part of the target, first seed; * at the edge of the grid.
Loss: mean over the test records of their mean token loss, responses only. Gradients: how many
examples had theirs formed. s: training steps alone, without evaluation. Beside AdamW, all n: the
loss when that arm had ended, and steps and seconds until its final loss (-: not reached).
"""

# From finetune/: of a folder with an __init__.py and a file of the same name, Python imports the folder.
from finetune.command import main

if __name__ == "__main__":
    main(description=__doc__.splitlines()[0])
