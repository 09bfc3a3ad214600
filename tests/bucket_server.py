"""Serves buckets on loopback until it is ended: bucket_server.py gs|s3 PORT.

The servers are emulators of other projects. That of GCS does not tell generations where
it hands out an object nor compare them where one is replaced, knows no ranges at the
end and one connection at a time; GCS does, so it is given these.
"""

import http
import http.server
import inspect
import re
import sys
import threading
import time

LOCK = threading.RLock()


def serve_s3(port: int) -> None:
    from moto.server import ThreadedMotoServer

    ThreadedMotoServer("127.0.0.1", port, verbose=False).start()


def serve_gcs(port: int) -> None:
    from gcp_storage_emulator import server, storage
    from gcp_storage_emulator.handlers import objects

    extend(objects)
    server.server.HTTPServer = http.server.ThreadingHTTPServer
    for name, method in vars(storage.Storage).items():
        if inspect.isfunction(method) and not name.startswith("__"):
            setattr(storage.Storage, name, locked(method))
    server.create_server("127.0.0.1", port, in_memory=True).start()


def locked(method):
    def call(*args, **options):
        with LOCK:
            return method(*args, **options)

    return call


def extend(objects) -> None:
    """Gives the emulator's objects generations and ranges at the end."""
    plain_download, plain_upload = objects.download, objects._media_upload

    def generation(storage, bucket, name):
        try:
            return str(storage.get_file_obj(bucket, name)["generation"])
        except objects.NotFound:
            return "0"

    def download(request, response, storage, *args, **options):
        place = request.params["bucket_name"], request.params["object_id"]
        last = re.fullmatch(r"bytes=-(\d+)", request.get_header("range", None) or "")
        with LOCK:
            found = generation(storage, *place)
            if found == "0":
                response.status = http.HTTPStatus.NOT_FOUND
                return
            size = len(storage.get_file(*place))
            if last and size:
                text, header = f"bytes={max(0, size - int(last[1]))}-", "range"
                plain = request.get_header
                request.get_header = lambda name, default=None: (
                    text if name == header else plain(name, default)
                )
            response["x-goog-generation"] = found
            plain_download(request, response, storage, *args, **options)

    def upload(request, response, storage):
        wanted = request.query.get("ifGenerationMatch")
        place = request.params["bucket_name"], request.query.get("name", [""])[0]
        _ = request.data  # Read before others are kept waiting.
        with LOCK:
            if wanted and wanted[0] != generation(storage, *place):
                response.status = http.HTTPStatus.PRECONDITION_FAILED
                return
            plain_upload(request, response, storage)

    objects.download, objects._media_upload = download, upload


if __name__ == "__main__":
    {"gs": serve_gcs, "s3": serve_s3}[sys.argv[1]](int(sys.argv[2]))
    while True:
        time.sleep(60)
