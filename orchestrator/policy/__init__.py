"""DECIDE. Pure functions: no I/O, no clock, no asyncio, no logging. Data in; data and a reason out.

decide.py is the way in: it asks lifecycle (one model's next move), admission (who may start or wake, where: placement, and who
goes for it: residency), footprint (how much memory) and budgets (which limits), and answers one Plan.
"""
