"""orchestratorctl: the operator's command line, an HTTP client of the daemon's admin API and nothing else.

    main.py      the group of verbs, and the one place where an error becomes an exit code
    change.py    verbs that change something: add-model, rm, start, stop
    residency.py verbs that move models in and out of memory: load, unload, sleep, wake, drain, pin, unpin
    plan.py      the verb that shows what a load would do
    limit.py     the verb that changes a model's KV bounds while it runs
    look.py      verbs that look: ls, ps, describe, explain, status; watch.py does it again and again, for --watch and top
    events.py    what happened; logs.py what engines wrote; following.py is the -f of both
    desired.py   verbs of desired state: apply, diff, export
    pull.py      the verb that loads a model from the hub
    top.py       the live page of all GPUs and models
    until.py     the verb `wait`
    completion.py the scripts for shells
    bench.py     the experiments; bench_kinds.py what is told of each, bench_run.py what is alike for all, bench_screen.py their bar
    options.py   options that all verbs share, and the kinds of values they take
    wait.py      follow a model to where an order wants it; progress.py draws it meanwhile
    client.py    the admin API over a unix socket or TCP; wire.py is its HTTP; target.py finds the daemon
    describe.py  the long page about one model; explain.py the one about GPU memory; tables.py the short ones
    screen.py    stdout and stderr; cells.py measures text as a terminal does
    exits.py     exit codes, and the error that carries one

The rule: fast to start (only click and the standard library at module top, and of the verbs only the one that is called), and stdout
carries data alone.
"""
