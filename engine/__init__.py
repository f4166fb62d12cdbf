"""The engine: search spaces, the PruningNet, population scoring, evolution, and one command per step.

Read it in the order the data flows: ``space`` (what may be pruned, and what it costs), ``pruningnet``
(the hypernetwork), ``population`` (many structures scored in one pass), ``sampling`` and ``evolution`` (the
search), ``pruned`` (one structure as a plain module); then the commands ``metatrain``, ``evolve``, ``retrain``,
``latency``, ``trust``, ``report``, ``inspect`` and ``doctor``.
"""
