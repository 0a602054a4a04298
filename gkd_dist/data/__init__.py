"""Where graphs come from: one module per kind of source, and the checks that all of them pass.

``sources.load_graph`` is the way in; ``arrays.save_arrays`` writes what ``kind: arrays`` reads.
"""
