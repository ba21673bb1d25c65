"""Workloads against a running daemon, what they measured, and pictures of it. `python -m bench NAME` runs one.

box.py        a daemon of its own in a temporary folder, driven with orchestratorctl, looked at through its admin API
workloads.py  what users do: bursts through /v1 with the official openai client
results.py    bench/results/NAME.json: figures, with the command, the machine and the versions they came from
plots.py      the same as a picture
demo.py, budgets.py, gpu_first_run.py, gpu_budgets.py, gpu_residency.py   one file = one name of `python -m bench`
plan_timing.py, limit_timing.py                         what budgets measures
grabs.py, wedge.py, throughput.py, scene.py             the parts of gpu-budgets, and what they share
cold.py, wakes.py, churn.py, churn_traffic.py, rig.py   the parts of gpu-residency, its traffic, and what they share
card.py, foreign.py, ballast.py, closed_loop.py, folders.py, leftovers.py   a card read 80 times a second; somebody else's memory;
              load; model folders; what engines leave
"""
