"""What a proxy costs, ours and others': `python -m bench proxy`.

main.py         each proxy in turn, on a core of its own, and the table
rivals.py       who they are, and how each is started
load.py, mock_engine.py   a client and an engine that cost next to nothing
"""
