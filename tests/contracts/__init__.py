"""What holds for every method and every family of models, without a line written for either.

`methods.py` lists the methods, `families.py` the families, `running.py` trains one on the other with the smallest settings, in this
process, and `workers.py` in processes of their own. `refused.json` says which pairs are refused today;
`python -m tests.contracts.refused` writes it.
A family that comes later is one entry in families.py; a method that comes later is none.
"""
