"""The promise to clients: job records, their states, a queue for each target, and the journal that survives power loss.

Whatever touches hardware is a job. ``model`` is pure (records and the state table), ``journal`` is the SQLite file behind one
writer thread, ``service`` is what the API and ``app`` use.
"""
