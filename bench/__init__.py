"""Workloads against a running daemon, what they measured, and pictures of it. `python -m bench NAME` runs one; __main__.py has the names.

box.py        a daemon of its own in a temporary folder, driven with orchestratorctl, looked at through its admin API
workloads.py  what users do: bursts through /v1 with the official openai client
results.py    bench/results/NAME.json: figures, with the command, the machine and the versions they came from
plots.py      the same as a picture; pictures.py  those of the docs
demo.py, budgets.py, adoption.py, soak.py, cli.py   one file = one NAME; plan_timing.py, limit_timing.py  what budgets measures
proxy/        what a proxy costs, ours and others'
chaos/        seeded faults of every kind under load, and what must hold meanwhile
gpu/          on real GPUs with real engines; each can be tried on simulated ones
card.py, foreign.py, ballast.py, folders.py   a card read 80 times a second; somebody else's memory; model folders
"""
