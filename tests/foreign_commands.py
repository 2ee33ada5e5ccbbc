"""Runs commands of ``grass-dist`` one after the other in this process; a list of argument lists comes on stdin.

What a command must not do leaves a line in the file that ``GRASS_TRAP`` names: see `SITE`, which Python imports in this
process and in each one that it starts.
"""

from __future__ import annotations

import json
import logging
import sys
import time

SITE = """
import builtins, os, socket, sys

def caught(what):
    with open(os.environ["GRASS_TRAP"], "a") as file:
        file.write(what + "\\n")

def here(host):
    return host in (None, "", "0.0.0.0", "::", "localhost", "127.0.0.1", "::1", socket.gethostname(), "203.0.113.1")

def watch(event, args):
    if event == "socket.getaddrinfo":
        host = args[0].decode() if isinstance(args[0], bytes) else args[0]
        here(host) or caught(f"asked for the host {host}")
    if event == "socket.connect" and isinstance(args[1], tuple) and not here(args[1][0]):
        caught(f"connected to {args[1]}")
    if event == "import" and args[0].split(".")[-1] == "trap":
        caught(f"imported {args[0]}")

sys.addaudithook(watch)
builtins.input = lambda prompt="": caught(f"asked: {prompt}") or "n"
"""


def main() -> None:
    from typer.testing import CliRunner

    from grass_dist.cli import app

    logging.raiseExceptions = False  # of handlers that hold on to the stderr of an earlier command's runner
    told = []
    for arguments in json.load(sys.stdin):
        began = time.monotonic()
        done = CliRunner().invoke(app, arguments)
        print(f"{time.monotonic() - began:.1f} s: {' '.join(arguments)}", file=sys.stderr)
        error = done.exception if not isinstance(done.exception, SystemExit) else None
        told.append({"code": done.exit_code, "output": done.output, "error": repr(error) if error else None})
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
