"""An OTLP/HTTP collector that reads requests with opentelemetry-proto and prints them as JSON lines at the end.

The first request is answered with 503 and Retry-After.
"""
import gzip
import http.server
import json
import sys
import threading

from google.protobuf.json_format import MessageToDict
from google.protobuf.unknown_fields import UnknownFieldSet
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

KINDS = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/logs": ExportLogsServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
}
received = []
refused = []


def unknown(message):
    """Numbers of the fields of a message, at any depth, that the definitions do not have."""
    found = [field.field_number for field in UnknownFieldSet(message)]
    for field, value in message.ListFields():
        if field.message_type:
            for inner in [value] if hasattr(value, "ListFields") else value:
                found += unknown(inner)
    return found


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status = 200
        if not refused:
            refused.append(body)
            status = 503
        else:
            request = KINDS[self.path]()
            request.ParseFromString(body)
            received.append({
                "path": self.path,
                "content_type": self.headers["Content-Type"],
                "key": self.headers.get("x-api-key"),
                "again": body == refused[0],
                "unknown": unknown(request),
                "request": MessageToDict(request),
            })
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(f"listening on {server.server_address[1]}.", flush=True)
sys.stdin.read()
for request in received:
    print(json.dumps(request), flush=True)
