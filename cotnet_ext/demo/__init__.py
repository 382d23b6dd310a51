"""`cotnet-ext demo`: every module beside its reference on photographs, and a network that learns.

Needs the `demo` extra (scikit-learn, matplotlib, rich). `run.py` tells the story; the other files
are its parts.
"""
