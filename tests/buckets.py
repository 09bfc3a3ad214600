"""Buckets on loopback: servers of other projects that speak as GCS and S3 do."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

SERVER = Path(__file__).parent / "bucket_server.py"


def variables(scheme: str, url: str) -> dict[str, str]:
    """The environment by which the libraries find a server."""
    if scheme == "gs":
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
            "FSSPEC_GCS_TOKEN": "anon",
        }
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def server(scheme: str):
    """Runs a server; yields the variables of those who use it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(SERVER), scheme, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(process, port)
        yield variables(scheme, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def make(scheme: str) -> str:
    """Makes a bucket on the server that the environment names; returns its address."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    if scheme == "gs":
        import requests

        url = f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b"
        requests.post(url, json={"name": name}, timeout=30).raise_for_status()
    else:
        import boto3

        boto3.client("s3").create_bucket(Bucket=name)
    return f"{scheme}://{name}"


def _wait(process: subprocess.Popen, port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        assert process.poll() is None, "the server has ended"
        time.sleep(0.1)
    raise TimeoutError("the server does not answer")
