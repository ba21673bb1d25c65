"""On real GPUs with real engines. Each file with a `main` is a NAME of `python -m bench`: gpu-budgets is budgets.py.

first_run.py    two engines, NVML at every stage
budgets.py      what limits are worth; its parts: grabs.py, wedge.py, throughput.py (with closed_loop.py, a load), on a scene.py
residency.py    who is on a card; its parts: cold.py, wakes.py, churn.py (with churn_traffic.py), on a rig.py
shared.py       `orchestratorctl bench` as a user types it
survive.py      one thing after the other is killed
parts.py        the command line of those with parts; leftovers.py  what engines leave
"""
