"""RUN. The one loop (reconciler.py: observe -> decide -> act -> publish) and what others may talk to: registry and traffic."""
