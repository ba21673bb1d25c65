"""`python -m orchestrator.cli`: the same as the script `orchestratorctl`, for a checkout that is not installed.

Nothing else lives here, so that both start alike.
"""

from orchestrator.cli.main import main

main()
