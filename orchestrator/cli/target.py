"""Where the daemon is: --host, else $ORCH_HOST, else the first admin socket that exists in the three usual places.

A place we may not look into counts as absent, unless all are: then the answer is "no permission", not "no daemon".
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from orchestrator.cli.exits import DENIED, UNREACHABLE, CliError


class Target(NamedTuple):  # dataclasses would cost each start 5 ms, most of it for importing them
    """A unix socket (`socket` is its path) or a TCP address (`host`, `port`, and the `prefix` a proxy may add)."""

    shown: str
    socket: str | None = None
    host: str = "localhost"
    port: int = 0
    prefix: str = ""


def parse(text: str) -> Target:
    """Raises ValueError with the mend."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise ValueError(f"{text!r} names no absolute path: write unix:///run/orchestrator/admin.sock")
        return Target(text, socket=path)
    if text.startswith("http://"):
        return _tcp(text)
    if "://" not in text and "/" in text:
        return Target(text, socket=os.path.expanduser(text))
    raise ValueError(f"{text!r} is not an address: write a socket's path, unix:///PATH or http://HOST:PORT")


def _tcp(text: str) -> Target:
    from urllib.parse import urlsplit

    wrong = ValueError(f"{text!r} is not an address: write http://HOST:PORT, like http://gpu-box:8000")
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
        if not host or not port or url.query or url.fragment or url.username is not None:
            raise wrong
        host.encode("idna")
    except ValueError:  # also UnicodeError: a host name that cannot be one
        raise wrong from None
    return Target(text, host=host, port=port, prefix=url.path.rstrip("/"))


def places(environ: Mapping[str, str]) -> list[str]:
    runtime = environ.get("XDG_RUNTIME_DIR")
    mine = [f"{runtime}/orchestrator/admin.sock"] if runtime else []
    return [*mine, "/run/orchestrator/admin.sock", f"/tmp/orchestrator-{os.getuid()}/admin.sock"]


def find(tried: list[str]) -> Target:
    """The first of `tried` that exists. Raises CliError with what to do about none."""
    closed: list[str] = []
    for path in tried:
        try:
            os.stat(path)
        except PermissionError:
            closed.append(path)
        except OSError:
            continue
        else:
            return Target(path, socket=path)
    if closed:
        raise CliError(no_permission(closed[0]), DENIED, code="permission_denied")
    raise CliError(
        "no daemon found: none of these sockets exists",
        UNREACHABLE,
        code="daemon_unreachable",
        lines=[
            *(f"  {path}" for path in tried),
            "start one (`make run` in a checkout, `systemctl start orchestrator` where it is installed),",
            "or name another with --host or ORCH_HOST",
        ],
        body={"tried": tried},
    )


def no_permission(path: str) -> str:
    """Says which group would open the way to `path`, as far as we may see."""
    at = path
    while at != "/":
        try:
            gid = os.stat(at).st_gid
        except OSError:
            at = os.path.dirname(at) or "/"
            continue
        import grp

        try:
            group = grp.getgrgid(gid).gr_name
        except KeyError:
            group = str(gid)
        join = f"join it (`sudo usermod -aG {group} $USER`, then log in again)"
        return f"no permission on {path}: it belongs to group {group!r}; {join} or use sudo"
    return f"no permission on {path}: ask who runs the daemon for access, or use sudo"
