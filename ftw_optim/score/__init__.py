"""Scores of all records of a pool towards a target, without training: ``python -m ftw_optim.score MODEL POOL TARGET``.

The score of a record is the inner product of its gradient with the mean gradient of the target's rows, in the metric of
an AdamW's coming step: to first order, how much one step on this record alone lowers the target loss.

``_records.py`` reads and encodes, ``_model.py`` loads the model and says what is trained, ``_metric.py`` fixes the
optimizer's ``P``, ``_gradients.py`` makes a row of numbers of each record's gradient, ``_store.py`` keeps these rows in
a folder, ``_scoring.py`` fills it, ``_ranking.py`` compares it with a target, ``_table.py`` shows what came out. Needs
the extra ``transformers``, and peft for LoRA. May import ``integrations.streaming`` and all that a step is made of.
Change it for another kind of record, model or file.
"""
