"""Arms of pays.py across settings: final test losses side by side, and whether they differ from one arm's.

Run: python benchmarks/across.py FOLDER [FOLDER ...] --beside ARM

A folder is one that pays.py wrote, such as those in benchmarks/results/pays/. Of each arm: its final test loss, the
mean over seeds, and the mean paired difference to the arm that --beside names, over the seeds that both have. An arm
without a proposal takes the first of the records that a step reads, so with --others such arms can be taken from
results with another --read-ahead.
"""

# From pays/: of a folder with an __init__.py and a file of the same name, Python imports the folder.
from pays.across import main

if __name__ == "__main__":
    main(description=__doc__.splitlines()[0])
