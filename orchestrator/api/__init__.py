"""HTTP in. openai.py and proxy.py for users (/v1/*), admin.py for operators (/api/v1/*), app.py puts them together."""
