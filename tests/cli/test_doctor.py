"""doctor asks the daemon: a line for each finding, its mend under it, and exit code 1 where one is bad."""

import json

from .conftest import Ctl
from .stub_daemon import Reply, StubDaemon

GOOD = {"state": "ok", "about": "GPU 0", "what": "NVIDIA H200", "mend": ""}
BAD = {"state": "bad", "about": "engines.default", "what": "it is not there", "mend": "sudo make engine"}


def test_each_finding_is_a_line_with_its_mend(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.replies["GET", "/doctor"] = Reply(200, {"findings": [GOOD, BAD]})
    said = ctl("doctor")
    assert said.stdout == "ok       GPU 0: NVIDIA H200\nbad      engines.default: it is not there\n         -> sudo make engine\n"
    assert said.exit_code == 1


def test_where_nothing_is_bad_it_is_done(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.replies["GET", "/doctor"] = Reply(200, {"findings": [GOOD, {**BAD, "state": "warning"}]})
    said = ctl("doctor", "--json")
    assert (said.exit_code, json.loads(said.stdout)["findings"][0]) == (0, GOOD)
