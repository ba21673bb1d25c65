"""What this is for, measured on the user's own GPUs and models: `orchestratorctl bench` (docs/bench.md).

    bursts.py         single and shared: the same bursts through the daemon, and on static engines
    mix.py            mix: many models, Zipf popularity, bursty arrivals; what was answered as promised
    house.py          the running daemon: its models are brought up, unloaded, and left as they were found
    beforehand.py     what is looked at before anything is changed
    static_engine.py  a plain vLLM with a static pool; keeper.py, a process that ends it whatever happens to us
    watch.py          the GPUs' memory five times a second, past the daemon; samples.py, one look
    answers.py        asks for completions, and times them; asker.py, the thread in which that is done
    arrivals.py, figures.py, record.py   pure: who asks what and when; percentiles, memory, goodput; what was measured so far
    report.py         result.json, samples.csv and the table; plots.py, the pictures (matplotlib, where it is installed)
    trouble.py        why it can not be, or can not go on

The rule: nothing is left behind. What is started ends with us, what is changed in the daemon is changed back, and what was measured until
then is written, marked as incomplete.
"""
