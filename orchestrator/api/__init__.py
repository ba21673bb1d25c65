"""HTTP in. openai.py and proxy.py for users (/v1/*), admin.py for operators (/api/v1/*), app.py puts them together.

server.py is the side of the clients, upstream.py the side of the engines: what both know is a connection.
"""
