"""An S3 server of one made-up bucket that can only be listed: pages of ListObjectsV2 are generated when asked for.

`python -m tests.bench.listing_server NUM_OBJECTS OBJECTS_PER_SOURCE` prints its port and serves until it is ended.
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from darnet.scan import Source, StoredObject

PAGE_KEYS = 1_000  # as S3 has it
NUM_BYTES = 524_288
PAGE = (
    '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    "<Name>archive</Name><Prefix></Prefix><MaxKeys>1000</MaxKeys><EncodingType>url</EncodingType>"
    "<KeyCount>{count}</KeyCount><IsTruncated>{truncated}</IsTruncated>{following}{contents}</ListBucketResult>"
)
CONTENT = (
    "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;{etag}&quot;</ETag>"
    f"<Size>{NUM_BYTES}</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


def name_object(index: int, objects_per_source: int) -> tuple[str, str]:
    """Key and ETag of an object; keys are in the order of their numbers."""
    return f"ct/{index // objects_per_source:08d}/{index % objects_per_source:04d}.dcm", f"{index:032x}"


def make_source(number: int, objects_per_source: int) -> Source:
    """A source as a listing of this server yields it."""
    first = number * objects_per_source
    named = (name_object(index, objects_per_source) for index in range(first, first + objects_per_source))
    objects = tuple(StoredObject(key, NUM_BYTES, etag) for key, etag in named)
    return Source(objects[0].key.rpartition("/")[0], objects)


def write_page(start: int, num_objects: int, objects_per_source: int) -> bytes:
    """The page that begins with an object."""
    end = min(start + PAGE_KEYS, num_objects)
    named = (name_object(index, objects_per_source) for index in range(start, end))
    contents = "".join(CONTENT.format(key=key, etag=etag) for key, etag in named)
    following = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < num_objects else ""
    truncated = str(end < num_objects).lower()
    return PAGE.format(count=end - start, truncated=truncated, following=following, contents=contents).encode()


def serve(num_objects: int, objects_per_source: int) -> None:
    """Answer every request as a listing until the process is ended."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open

        def do_GET(self) -> None:
            asked = parse_qs(urlsplit(self.path).query)
            body = write_page(int(asked.get("continuation-token", ["0"])[0]), num_objects, objects_per_source)
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """A million objects are a thousand lines."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
