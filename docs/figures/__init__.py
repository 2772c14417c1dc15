"""The documentation's figures, drawn by code: `python -m docs.figures`, at the repository's root.

Each module draws one, with style.py's hand: data_flow, step, rooms, job; and, from what run_data.py
has kept of a real run in data/, label_maps, curves and adversary.
"""
