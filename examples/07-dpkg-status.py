#!/usr/bin/env python3
"""Load every package record of /var/lib/dpkg/status, kill the server with SIGKILL in the middle, finish, prove that all is there.

Starts its own server on a directory of its own. Needs curl and an interpreter that can run ``python -m ayder``. Each record is
sent as JSON with its section as the key, in batches that carry an idempotency key; a batch whose answer was lost is sent again
with the same key. At the end every record is there once, with the same bytes, and the records of a section are in the order they
were sent in. Without that file, the files of Python's own library are the records.
"""

import base64
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time

TOPIC = "packages"
PARTITIONS = 4
BATCH = 20
TOKEN = "dev"
RECORDS_TYPE = "application/vnd.ayder.records+ndjson"

Record = tuple[str, str]  # key, value


def real_records() -> tuple[str, list[Record]]:
    """Data nobody here wrote: where it is from, and its records."""
    status = pathlib.Path("/var/lib/dpkg/status")
    if not status.exists():
        library = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files = sorted(path for path in library.rglob("*.py") if path.is_file())[:500]
        return str(library), [(one.parent.name, json.dumps({"name": one.name, "size": one.stat().st_size})) for one in files]
    records = []
    for stanza in status.read_text(encoding="utf-8").strip().split("\n\n"):
        fields = dict(re.findall(r"^(\S+?):[ \t]*((?:.*)(?:\n[ \t].*)*)", stanza, re.MULTILINE))
        records.append((fields.get("Section", "none"), json.dumps(fields, ensure_ascii=False)))
    return str(status), records


class Server:
    """The node, in a process of its own."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        output = self.directory / "server.out"
        command = [sys.executable, "-m", "ayder", "serve", "--bind", "127.0.0.1:0", "--data", str(self.directory / "data")]
        with output.open("wb") as out, (self.directory / "server.err").open("ab") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err)
        deadline = time.monotonic() + 30
        while not (found := re.search(r"listens on (\S+)", output.read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start: {(self.directory / 'server.err').read_text()}")
            time.sleep(0.02)
        self.url = found[1]

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def curl(*arguments: str, body: str = "") -> str:
    """The body of a 2xx answer. Raises ``CalledProcessError`` when there is none: the outcome is unknown."""
    command = ["curl", "-sS", "--fail-with-body", "-m", "30", "-H", f"Authorization: Bearer {TOKEN}", *arguments]
    return subprocess.run(
        command, input=body.encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    ).stdout.decode()


def send(server: Server, number: int, batch: list[Record]) -> dict[str, object]:
    """One batch, all or nothing, with its number as the idempotency key."""
    lines = "\n".join(json.dumps({"key": key, "value": value}, ensure_ascii=False) for key, value in batch)
    headers = ("-H", f"Content-Type: {RECORDS_TYPE}", "-H", f"Idempotency-Key: batch-{number}")
    answer: dict[str, object] = json.loads(
        curl(*headers, "--data-binary", "@-", f"{server.url}/broker/topics/{TOPIC}/produce-ndjson", body=lines)
    )
    if answer["count"] != len(batch):
        sys.exit(f"batch {number} has {len(batch)} records, the answer says {answer}")
    return answer


def load(server: Server, batches: list[list[Record]]) -> tuple[int, int]:
    """Send everything; the server dies once on the way. Returns how many answers were lost, and how many of those had happened.

    Raises ``CalledProcessError`` for a call that fails for any other reason.
    """
    curl("-d", json.dumps({"name": TOPIC, "partitions": PARTITIONS}), f"{server.url}/broker/topics")
    fatal = len(batches) // 2
    lost = happened = 0
    killer = threading.Timer(random.uniform(0, 0.03), server.kill)
    for number, batch in enumerate(batches):
        if number == fatal:
            print(f"   {number} of {len(batches)} batches are acknowledged; SIGKILL while the next ones are sent")
            killer.start()
        try:
            send(server, number, batch)
        except subprocess.CalledProcessError:
            if number < fatal or lost:
                raise
            lost += 1
            killer.join()
            server.start()
            happened += bool(send(server, number, batch)["duplicate"])
    return lost, happened


def read_all(server: Server) -> list[list[Record]]:
    """Every record, by partition."""
    found: list[list[Record]] = []
    for partition in range(PARTITIONS):
        records: list[Record] = []
        more = True
        while more:
            query = f"offset={len(records)}&limit=200&encoding=b64"
            page = json.loads(curl(f"{server.url}/broker/topics/{TOPIC}/{partition}/records?{query}"))
            records += [
                (base64.b64decode(one["key_b64"]).decode(), base64.b64decode(one["value_b64"]).decode())
                for one in page["messages"]
            ]
            more = page["truncated"]
        found.append(records)
    return found


def prove(sent: list[Record], found: list[list[Record]]) -> None:
    """Count, bytes, order per key, one partition per key. Exits with a message at the first difference."""
    count = sum(len(records) for records in found)
    if count != len(sent):
        sys.exit(f"{len(sent)} records were sent, {count} are there")
    if sorted(sent) != sorted(record for records in found for record in records):
        sys.exit("the records are not the ones that were sent")
    for key in sorted({key for key, _ in sent}):
        homes = [records for records in found if any(one == key for one, _ in records)]
        if len(homes) != 1:
            sys.exit(f"the records of {key} are in {len(homes)} partitions")
        if [record for record in homes[0] if record[0] == key] != [record for record in sent if record[0] == key]:
            sys.exit(f"the records of {key} are not in the order they were sent in")


def main() -> None:
    source, records = real_records()
    batches = [records[at : at + BATCH] for at in range(0, len(records), BATCH)]
    print(f"1. {len(records)} records in {len({key for key, _ in records})} keys from {source}")
    with tempfile.TemporaryDirectory(prefix="ayder-example-") as directory:
        server = Server(pathlib.Path(directory))
        try:
            server.start()
            print(f"2. a server of our own on {server.url}")
            lost, happened = load(server, batches)
            if not lost:
                sys.exit("the server was to die on the way, and did not")
            print(
                f"3. restarted and finished; {lost} answer was lost; that batch had {'happened' if happened else 'not happened'}"
            )
            prove(records, read_all(server))
            print("4. every record is there once, with its bytes, in order within its key")
            if not all(send(server, number, batch)["duplicate"] for number, batch in enumerate(batches)):
                sys.exit("a batch was taken twice")
            prove(records, read_all(server))
            print("5. all batches sent once more: every one is known, nothing changed")
        finally:
            server.kill()


if __name__ == "__main__":
    os.environ.setdefault("LC_ALL", "C.UTF-8")
    main()
