"""Status 0 when the node in this container answers ``GET /health``, else 1: what ``HEALTHCHECK`` of the image runs.

It asks whether the process lives, not whether it is ready: a node that waits for its peers must not be restarted for it.
"""

import http.client
import os
import ssl
import sys

TIMEOUT_S = 4.0


def connection() -> http.client.HTTPConnection:
    """To the port of ``AYDER_HTTP__PORT`` on loopback, over TLS when the node has a certificate."""
    environment = os.environ  # noqa: TID251  (a program of its own)
    port = int(environment.get("AYDER_HTTP__PORT", "1109"))
    if not environment.get("AYDER_HTTP__TLS_CERTIFICATE"):
        return http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    # The certificate is for the name that clients use; on loopback there is nobody to be mistaken for.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=context)


def main() -> str | None:
    """What is wrong with the node, if anything."""
    asked = connection()
    try:
        asked.request("GET", "/health")
        status = asked.getresponse().status
    except (OSError, http.client.HTTPException) as exc:
        return f"not healthy: {exc}"
    finally:
        asked.close()
    return None if status == 200 else f"not healthy: status {status}"


if __name__ == "__main__":
    sys.exit(main())
