"""A daemon with simulated engines while everything around it goes wrong: `python -m bench chaos`, `make chaos`.

main.py         several seeds, their outcomes, and how one is replayed
schedule.py     what goes wrong when, drawn from the seed before anything runs
run.py          one seed's run
faults.py, daemon_faults.py   each fault, done and undone
asking.py, commands.py        a user's requests; an operator's orders
book.py         what was commanded and done: by it fates are judged
watch.py        what must hold at every moment
daemon.py, http.py            the daemon as a process that is killed and comes back; bare connections
"""
