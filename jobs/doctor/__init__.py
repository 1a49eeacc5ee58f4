"""`flamingo doctor`: checks a machine or an allocation before a run, and says what to do.

One module a group of checks, each check a plain function that returns findings (`findings.py`). `node.py` makes those
of one node, `reach.py` has them made on every node, `command.py` puts all together.
"""
