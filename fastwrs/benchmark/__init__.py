"""Optimizer steps measured against each other in turns: what ``python -m fastwrs bench`` and ``bench/`` have in common.

lists.py: the parameters of known networks and of models of your own. sides.py: what takes turns, and the check that it
is right. turns.py: the clock. command.py: the command.
"""
