"""Who is refused where no key is asked for: pages of other sites, in the browser of somebody who may.

The admin socket asks the kernel who connects, and a port on loopback asks nobody; a browser is there in its user's name, also through
`ssh -L`, and sends what any page tells it to. It says of itself whose page that is: `Sec-Fetch-Site`, `Origin`. A name that has been
turned to this address (DNS rebinding) makes a foreign page look like our own, so the name must be one of this machine.
Whoever sends neither header is no browser's page, and is none of this file's business.
"""

import ipaddress
from collections.abc import Mapping

from starlette.requests import Request

from orchestrator.errors import Forbidden


async def check(request: Request) -> None:
    """For the admin socket. Raises Forbidden, which names the header."""
    refuse_foreign(request.headers, any_host=False)


def refuse_foreign(headers: Mapping[str, str], any_host: bool) -> None:
    """`any_host`: a gateway or a key stands before it, so that names are not ours to judge. Raises Forbidden."""
    site, origin, host = headers.get("sec-fetch-site"), headers.get("origin"), headers.get("host", "")
    if site is None and origin is None:
        return
    if site not in (None, "same-origin", "none"):
        raise Forbidden(f"A page of another site asked for this (Sec-Fetch-Site: {site}): open /ui itself.")
    if origin is not None and origin.partition("://")[2] != host:
        raise Forbidden(f"A page of {origin!r} asked for this, and this is {host!r} (Origin): open /ui itself.")
    if not any_host and not _is_local(host):
        raise Forbidden(
            f"The name {host!r} may be somebody else's (Host): open it as http://localhost:PORT/ui; a proxy before it sends"
            " `Host: localhost`, or sets keys.required to `never` and asks for keys itself."
        )


def _is_local(host: str) -> bool:
    """An address in digits, or `localhost`: 127.0.0.1.example.org is a name like any other."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
