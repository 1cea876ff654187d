"""Buckets of others before the real S3 server, read-only: a public one, and one whose requesters pay.

As Amazon's do: a public bucket answers requests without a signature (here the owner's is added on the way to the server), and refuses
signatures of keys that it does not know; one whose requesters pay refuses signed requests without `x-amz-request-payer: requester`.
"""

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.s3 import ACCESS_KEY, REGION, SECRET_KEY


@contextlib.contextmanager
def bucket_of_others(server: int, *, requester_pays: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield the port of the bucket's service, and the list of the requests that it answered."""
    answered = list[str]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            signed = "Authorization" in self.headers
            if requester_pays and not (signed and self.headers.get("x-amz-request-payer") == "requester"):
                self._refuse("AccessDenied")
                return
            if not requester_pays and signed:
                self._refuse("InvalidAccessKeyId")
                return
            headers = dict(self.headers.items())
            if not signed:
                url = f"http://127.0.0.1:{server}{self.path}"
                wanted = {name: value for name, value in headers.items() if name.lower() in ("range", "if-match")}
                request = AWSRequest(self.command, url, headers=wanted)
                S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", REGION).add_auth(request)
                headers = {**dict(request.headers.items()), "Host": f"127.0.0.1:{server}"}
            answered.append(f"{self.command} {self.path}")
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server)) as upstream:  # also if who asked is gone
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in headers.items():
                    upstream.putheader(name, value)
                upstream.endheaders()
                answer = upstream.getresponse()
                body = answer.read()
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        do_HEAD = do_GET

        def _refuse(self, code: str) -> None:
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>refused</Message></Error>".encode()
            self.send_response_only(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        def log_message(self, *args: object) -> None:
            """Write nothing."""

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.daemon_threads = True
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    try:
        yield service.server_address[1], answered
    finally:
        service.shutdown()
        service.server_close()
        thread.join(60)
